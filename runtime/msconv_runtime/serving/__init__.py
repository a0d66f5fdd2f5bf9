"""Serving an artifact, whichever engine does it: settings, checks, the command, loading inside the server.

An engine is a folder beside this one with a file `engine.py`; `engine` says what it tells.
"""

"""Executing a plan: one pass over the sources, bounded buffers, digests as bytes pass, a journal, READY last.

Nothing here knows which model it moves.
"""

"""Artifacts to and from the repositories of a hub."""

"""The library with which the hub's client speaks HTTP: httpx2, or its predecessor httpx under huggingface_hub 1.

Both may be installed.  Errors are caught by their classes, so it has to be the client's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from huggingface_hub.errors import HfHubHTTPError

if TYPE_CHECKING:
    import httpx2 as http
else:
    base = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    http = import_module(base.__module__.partition(".")[0])

__all__ = ["http"]

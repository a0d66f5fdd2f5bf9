"""An HTTP request as ASGI gives it: its path, and whether it has a key.  Knows no web framework."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def path_of(scope: Scope) -> str:
    """As a router sees it: without the root path that a proxy has added."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def has_key(scope: Scope, keys: Iterable[str]) -> bool:
    """Whether the bearer token is one of these."""
    given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
    kind, _, token = given.partition(b" ")
    right = [secrets.compare_digest(token, key.encode()) for key in keys]
    return kind.lower() == b"bearer" and any(right)

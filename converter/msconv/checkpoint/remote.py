"""A file of a hub's repository, and what is said while it comes; no client is needed to know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

SHA1_DIGITS = 40

Progress = Callable[[int], None]


class Cancelled(Exception):
    """The download is not wanted any more."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.  `etag`: sha256 of its bytes if it is kept apart from git, else git's own sha1."""

    name: str
    size: int
    etag: str


class Digest(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...

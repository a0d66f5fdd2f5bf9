"""A file that is elsewhere, and what is said while it comes; no client is needed to know it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..quant.modelslim import DESCRIPTION
from .directory import AUXILIARY, INDEX_NAME, SHARD_NAME

SHA1_DIGITS = 40
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's sha1 of a file, or sha256 of its bytes
CONFIGURATION = ("config.json", "generation_config.json", DESCRIPTION)

Progress = Callable[[int], None]


class Cancelled(Exception):
    """The download is not wanted any more."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository or a store.  `etag`: on a hub sha256 of its bytes if it is kept apart from git, else
    git's own sha1; in a store, whatever tells its version."""

    name: str
    size: int
    etag: str


def is_wanted(name: str) -> bool:
    """Whether a file of this name is ever asked for: no code, no pickles."""
    return name in (*AUXILIARY, DESCRIPTION) or bool(INDEX_NAME.fullmatch(name) or SHARD_NAME.fullmatch(name))


def hasher(etag: str, size: int) -> hashlib._Hash:
    """What makes the digest of that kind, of a file of `size` bytes."""
    if len(etag) == SHA1_DIGITS:  # as git hashes a file
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.sha256()

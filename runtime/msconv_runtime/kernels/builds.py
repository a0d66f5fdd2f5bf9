"""Libraries compiled on this machine, kept in the cache directory: built once a key, loaded only as built.

A library is code, so the directory must be this user's alone: then nobody else can change it between the check of
a library and its loading.  Damage is found by a SHA-256 beside each library, as `sha256sum` writes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from ..artifact import sync_directory
from ..cache_directory import ELSEWHERE, cache, private
from ..errors import ResourceError

logger = logging.getLogger(__name__)
MODE = 0o600  # of a library and its digest: loading asks for no more


def cached_build(
    name: str,
    key: Sequence[str | bytes],
    build: Callable[[Path], None],
    check: Callable[[Path], None] | None = None,
) -> Path:
    """The library of this name and key, built now if it is not there or not as it was built (the log says why).

    `key`: all that the bytes depend on, such as compiler, flags and sources.  `build` writes the library to the
    path it is given, in a directory of its own; `check` raises if the result is not to be kept.  Both run in one
    process at a time, the others wait; what they raise passes through.  A process may die at any moment: the next
    one finds a whole library, or builds again.

    Raises ResourceError if there is no safe directory, and for every OSError.
    """
    directory = cache()
    try:
        directory = private(directory)
        path = directory / f"{name}-{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]}.so"
        if not _fault(path):
            return path
        from filelock import FileLock

        with FileLock(directory / f"{path.name}.lock", mode=MODE):
            if fault := _fault(path):  # no other process has built it meanwhile
                if os.path.lexists(path):
                    logger.warning("msconv: %s is built again: %s", path, fault)
                _replace(path, build, check)
    except OSError as e:
        raise ResourceError(f"{directory}: {e}", ELSEWHERE) from None
    return path


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest_line(path: Path) -> bytes:
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode()


def _fault(path: Path) -> str:
    """Why the library in the private directory is not to be loaded, or ""."""
    for file in (path, _digest_file(path)):
        try:
            status = file.lstat()
        except FileNotFoundError:
            return f"there is no {file.name}"
        if not stat.S_ISREG(status.st_mode):
            return f"{file.name} is no regular file"
        if status.st_uid != os.geteuid():
            return f"{file.name} belongs to user {status.st_uid}"
        if stat.S_IMODE(status.st_mode) != MODE:
            return f"{file.name} has mode {stat.S_IMODE(status.st_mode):04o}"
    return "" if _digest_file(path).read_bytes() == _digest_line(path) else "its digest differs"


def _replace(path: Path, build: Callable[[Path], None], check: Callable[[Path], None] | None) -> None:
    """Under the lock.  The digest comes last: until then, the library does not count."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(0o700)
    try:
        made = part / path.name
        build(made)
        if check is not None:
            check(made)
        digest = _digest_file(made)
        digest.write_bytes(_digest_line(made))
        for file in (made, digest):
            file.chmod(MODE)
            with file.open("rb") as f:
                os.fsync(f.fileno())
        for file in (made, digest):
            file.replace(path.with_name(file.name))
        sync_directory(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)

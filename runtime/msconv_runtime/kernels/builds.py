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
from ..errors import ResourceError

logger = logging.getLogger(__name__)
MODE = 0o600  # of a library and its digest: loading asks for no more
ELSEWHERE = "XDG_CACHE_HOME may name another directory, where nobody else can write"


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


def cache() -> Path:
    """Where built libraries are kept, an absolute path.  Raises ResourceError if there is no home directory.

    https://specifications.freedesktop.org/basedir-spec/latest/: a relative path is invalid, and ignored."""
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if told.is_absolute():
        return told / "msconv"
    try:
        home = Path.home()
    except RuntimeError as e:
        raise ResourceError(str(e), ELSEWHERE) from None
    if not home.is_absolute():
        raise ResourceError(f"HOME is {home}, a relative path", ELSEWHERE)
    if told != Path():
        logger.warning("msconv: XDG_CACHE_HOME is %s, a relative path: %s/.cache is taken", told, home)
    return home / ".cache" / "msconv"


def private(directory: Path) -> Path:
    """The directory without symbolic links, made if it was not there.  Raises ResourceError if another user (other
    than root) could change what is in it, or put another in its place."""
    for place in reversed((directory, *directory.parents)):
        if not place.exists():
            place.mkdir(0o700, exist_ok=True)
    real, user = directory.resolve(strict=True), os.geteuid()
    for place in (real, *real.parents):
        status, parent = place.stat(), place != real
        if status.st_uid != user and not (parent and status.st_uid == 0):
            raise ResourceError(f"{place} belongs to user {status.st_uid}, this is user {user}", ELSEWHERE)
        # Where umask is 002, each user has a group of the same number, with nobody else in it.
        others = 0o002 if parent and status.st_gid == user else 0o022
        if status.st_mode & others and not (parent and status.st_mode & stat.S_ISVTX):
            mode = stat.S_IMODE(status.st_mode)
            raise ResourceError(f"others may write in {place}, its mode is {mode:04o}", ELSEWHERE)
    return real


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

"""The directory of this machine where msconv keeps what it can make or fetch again."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from .errors import ResourceError

logger = logging.getLogger(__name__)
ELSEWHERE = "XDG_CACHE_HOME may name another directory, where nobody else can write"


def cache() -> Path:
    """The directory, an absolute path, there or not.  Raises ResourceError if there is no home directory.

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

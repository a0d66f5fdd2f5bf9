"""Files of an artifact, which a stranger may have made: regular ones only, never longer than was said."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ArtifactError

AGAIN = "Copy the artifact again, or convert again with --force."


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file, at most so many.  A pipe or a device would wait, or never end.

    Raises ArtifactError for those and for more bytes, OSError as `open` does."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        refuse_irregular(path, status)
        if status.st_size > most:
            raise ArtifactError(f"{path}: {status.st_size} bytes is too large for this file; {most} is the limit.")
        data = file.read(most + 1)
    if len(data) > most:
        raise ArtifactError(f"{path}: is too large for this file, and grows; {most} bytes is the limit.")
    return data


def read_sized(path: Path, size: int) -> bytes:
    """The bytes of a file that must have this size.  Raises ArtifactError for what is missing or another."""
    try:
        check_size(path, size)
        data = read_file(path, size)
    except OSError as e:
        raise ArtifactError(f"{path}: {e.strerror}.", AGAIN) from None
    if len(data) != size:
        raise ArtifactError(f"{path}: has {len(data)} bytes, the manifest says {size}.", AGAIN)
    return data


def check_size(path: Path, size: int) -> None:
    """Raises ArtifactError if a file is missing, is none, or has another size than the manifest says."""
    try:
        status = path.stat()
    except OSError as e:
        raise ArtifactError(f"{path}: {e.strerror}.", "Copy the artifact again, or convert again.") from None
    except ValueError:  # a name that no file can have
        raise ArtifactError(f"{path}: no file can have this name.", AGAIN) from None
    refuse_irregular(path, status)
    if status.st_size != size:
        raise ArtifactError(f"{path}: has {status.st_size} bytes, the manifest says {size}.", AGAIN)


def refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path}: is no regular file.", AGAIN)

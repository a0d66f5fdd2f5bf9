"""What an error of the disk means to a person."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from msconv_runtime.errors import MsconvError, ResourceError


def out_of_space(root: Path, need: int, free: int) -> ResourceError:
    """The error for a disk that lacks room.  `need`, `free`: bytes."""
    return ResourceError(
        f"{root}: not enough disk: {need:,} bytes are still needed, {free:,} are free, "
        f"{max(0, need - free):,} are missing.",
        "Free that much or give another --output, then run the same command again: it resumes.",
    )


def disk_error(e: OSError, where: Path, need: int) -> MsconvError:
    """The error for an OSError while writing.  `need`: bytes that were still to be written."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = shutil.disk_usage(where if where.is_dir() else where.parent).free
        except OSError:
            free = 0
        return out_of_space(where, max(need, 1), free)
    hint = "Give a writable directory with --output."
    if e.errno == errno.EIO:
        hint = (
            "The system's log has more about the disk.  Run the same command again: what may be lost is written "
            "again; or give another --output."
        )
    return ResourceError(f"{e.filename or where}: cannot be written: {e.strerror}.", hint)

"""One process at a time in an artifact directory.  The second learns who is there."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msconv_runtime.artifact import STATE_DIR
from msconv_runtime.errors import BusyError, ResourceError

from .disk import disk_error


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold the directory.  Raises BusyError naming the holder, ResourceError if it cannot be written or its file
    system has no locks: without one, two commands could write the same files at a time."""
    state = root / STATE_DIR
    try:
        state.mkdir(parents=True, exist_ok=True)
        fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise disk_error(e, root, 0) from None
    try:  # closing it gives the lock back, and so does the end of the process
        _lock(fd, root)
        (state / "holder").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    except OSError as e:
        raise disk_error(e, root, 0) from e
    finally:
        os.close(fd)


def _lock(fd: int, root: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            holder = (root / STATE_DIR / "holder").read_text("utf-8", "replace").strip()
        except OSError:
            holder = "another process"
        raise BusyError(
            f"{root}: {holder[:200]} is working on this directory.", "Wait for it, or give another --output."
        ) from None
    except OSError as e:
        raise ResourceError(
            f"{root}: its file system gives no locks (flock: {e.strerror}): two commands could write there at a "
            "time.",
            "Give a directory on another file system with --output, or mount this one with locks: NFS needs its "
            "lock service or local_lock=flock, Lustre flock.",
        ) from None

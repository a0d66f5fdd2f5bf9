"""One process at a time in an artifact directory.  The second learns who is there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from msconv_runtime.artifact import STATE_DIR
from msconv_runtime.errors import BusyError

from .outputs import disk_error


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold the directory.  Raises BusyError naming the holder, ResourceError if it cannot be written."""
    state = root / STATE_DIR
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = FileLock(state / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        try:
            holder = (state / "holder").read_text("utf-8", "replace").strip()
        except OSError:
            holder = "another process"
        raise BusyError(
            f"{root}: {holder[:200]} is working on this directory.", "Wait for it, or give another --output."
        ) from None
    except OSError as e:
        raise disk_error(e, root, 0) from None
    try:
        (state / "holder").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    except OSError as e:
        raise disk_error(e, root, 0) from e
    finally:
        lock.release()

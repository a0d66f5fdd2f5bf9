"""Processes begin as copies of the one that starts them, where that is possible and MSCONV_REHEARSAL_START is not
`spawn`.

SGLang has each of its processes start anew and import for some 15 seconds what its parent has imported.  Beside a
real NPU it must: a driver's state cannot be copied.  Here there is none.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

_set = multiprocessing.set_start_method


def _set_start_method(method: str | None, force: bool = False) -> None:
    """Only a process of one thread is copied: a copy has no other, and would wait for it."""
    alone = sum(1 for _ in Path("/proc/self/task").iterdir()) == 1
    may = alone and os.environ.get("MSCONV_REHEARSAL_START") != "spawn"
    _set("fork" if method == "spawn" and may else method, force)


multiprocessing.set_start_method = _set_start_method  # type: ignore[assignment]

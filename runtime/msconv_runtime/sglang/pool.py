"""Memory of SGLang's pools on a CPU: reserved first, its pages given while the server is idle."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import mmap
import threading
import time
from collections.abc import Iterator
from typing import Any

MADV_POPULATE_WRITE = 23
RESERVE = 16 << 20  # bytes of a tensor from which on its memory is reserved
AT_ONCE = 1 << 30  # bytes that are given their pages before the server is ready
POPULATE = 2 << 20  # bytes a call
PAUSE_S = 0.001  # between calls, which keep other threads from running Python
IDLE_S = 0.1  # without a step, until the server counts as idle
_reserved: list[mmap.mmap] = []
_idle_from = 0.0  # on the monotonic clock
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def reserved_zeros() -> Iterator[None]:
    """In here torch.zeros takes large CPU tensors from memory that is zero until it is touched."""
    import torch

    zeros = torch.zeros

    def reserved(*size: Any, **options: Any) -> Any:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        dtype, device = options.get("dtype") or torch.get_default_dtype(), options.get("device")
        nbytes = math.prod(shape) * dtype.itemsize
        if not size or nbytes < RESERVE or str(device) != "cpu" or options.keys() - {"dtype", "device"}:
            return zeros(*size, **options)
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _reserved.append(memory)
        return torch.frombuffer(memory, dtype=dtype).reshape(shape)

    torch.zeros = reserved
    try:
        yield
    finally:
        torch.zeros = zeros


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """In here and shortly after, no pages are given to reserved memory: the memory's speed bounds a step's."""
    global _idle_from
    _idle_from = math.inf
    try:
        yield
    finally:
        _idle_from = time.monotonic() + IDLE_S


def populate_reserved() -> None:
    """Give the reserved memory its pages: from then on the server's memory does not grow with its use.  Little is
    done at once, more in a thread, as soon as and as long as the server is idle.  A kernel that cannot (before
    Linux 5.14) gives them when they are touched."""
    memories = list(_reserved)
    _reserved.clear()
    if sum(map(len, memories)) <= AT_ONCE:
        _populate(memories, 0.0)
    else:
        threading.Thread(target=_populate, args=(memories, PAUSE_S), name="msconv-pool", daemon=True).start()


def _populate(memories: list[mmap.mmap], pause_s: float) -> None:
    try:
        for memory in memories:
            for begin in range(0, len(memory), POPULATE):
                while time.monotonic() < _idle_from:
                    time.sleep(IDLE_S)
                memory.madvise(MADV_POPULATE_WRITE, begin, min(POPULATE, len(memory) - begin))
                time.sleep(pause_s)
    except OSError as e:
        if e.errno == errno.ENOMEM:
            logger.warning("msconv: no memory for all of the KV pool: give SGLang a smaller --max-total-tokens")

"""Python's searches for garbage while SGLang is imported: they take 1.3 s of a start, and find next to nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

RARELY = (50_000, 20, 50)  # new objects before a search of the youngest; how many of those before one of the
# middle generation; how many of these before one of all

_usual = gc.get_threshold()


def search_rarely() -> None:
    """From the process's start until `no_search` is left."""
    gc.set_threshold(*RARELY)


@contextlib.contextmanager
def no_search() -> Iterator[None]:
    """What comes into memory in here counts as old afterwards: no frequent search looks at it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else somebody's frozen objects would thaw
            gc.freeze()
            gc.unfreeze()
        if gc.get_threshold() == RARELY:
            gc.set_threshold(*_usual)
        if enabled:
            gc.enable()

"""Several files at a time, and one process at a time for a file: what is waited for can be given up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from .remote import Cancelled

LOCK_POLL_S = 0.2
T = TypeVar("T")
R = TypeVar("R")


def each(items: Iterable[T], work: Callable[[T], R], cancel: Callable[[], object], at_once: int) -> list[R]:
    """What `work` gives for each, in their order.  The first error, or an interruption, calls `cancel` and ends
    all."""
    with ThreadPoolExecutor(at_once) as pool:
        try:
            futures = [pool.submit(work, item) for item in items]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
            return [future.result() for future in futures]
        except BaseException:
            cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def locked(path: Path, cancelled: threading.Event) -> Iterator[None]:
    """Hold the lock of a file, which huggingface_hub takes too.  Raises Cancelled."""
    lock = FileLock(path)
    while not lock.is_locked:
        if cancelled.is_set():
            raise Cancelled
        with suppress(Timeout):
            lock.acquire(timeout=LOCK_POLL_S)
    try:
        yield
    finally:
        lock.release()

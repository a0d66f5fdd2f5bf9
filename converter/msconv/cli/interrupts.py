"""Ctrl-C while libraries compute.  In the middle of a call of MindSpore or torch a KeyboardInterrupt becomes a
long traceback, or is swallowed: instead a thread of ours says what there is to say, and ends the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .result import INTERRUPTED, report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OVER = 0  # what the thread reads when nothing has come
CLEAR = "\r\x1b[2K\x1b[?25h"  # a spinner's line goes, the cursor is back


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """For work that leaves nothing half-done, whenever it ends.  A signal ends this process and those that it has
    started, with exit code 130.  In another thread than the main one, which gets the signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    own = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
    for number in own:
        signal.signal(number, lambda signum, frame: None)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watching = threading.Thread(target=_leave_on_signal, args=(reading,), daemon=True)
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in own.items():
            signal.signal(number, handler)
        os.write(writing, bytes([OVER]))
        watching.join()
        os.close(reading)
        os.close(writing)


def _leave_on_signal(reading: int) -> None:
    if os.read(reading, 1)[0] == OVER:
        return
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(OSError):
        if sys.stderr.isatty():
            sys.stderr.write(CLEAR)
        report(KeyboardInterrupt())
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)

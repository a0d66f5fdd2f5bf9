"""Copies a directory with the system calls a converter makes, and nothing else: the floor for any converter."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

BLOCK = 16 << 20
START_EVERY = 64 << 20
SYNC_EVERY = 512 << 20


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    libc = ctypes.CDLL(None)
    view = memoryview(mmap.mmap(-1, BLOCK))
    target.mkdir(parents=True)
    for path in sorted(p for p in source.iterdir() if p.is_file()):
        size = path.stat().st_size
        a = os.open(path, os.O_RDONLY)
        b = os.open(target / path.name, os.O_RDWR | os.O_CREAT, 0o644)
        os.posix_fallocate(b, 0, size)
        done = started = synced = 0
        while done < size:
            n = os.preadv(a, [view[: min(BLOCK, size - done)]], done)
            os.pwrite(b, view[:n], done)
            done += n
            if done - started >= START_EVERY:
                libc.sync_file_range(b, ctypes.c_int64(0), ctypes.c_int64(0), 2)
                started = done
            if done - synced >= SYNC_EVERY:
                os.posix_fadvise(a, 0, done, os.POSIX_FADV_DONTNEED)
                os.fdatasync(b)
                os.posix_fadvise(b, 0, 0, os.POSIX_FADV_DONTNEED)
                synced = done
        os.fdatasync(b)
        os.close(a)
        os.close(b)


main()

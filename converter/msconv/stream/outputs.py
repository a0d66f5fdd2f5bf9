"""The rank files while they are being written: preallocated, written at final offsets, renamed when whole.

A write or a sync that failed is final.  Linux reports pages that it could not write out once, and drops them: the
next sync would succeed without them.  So none is tried again, and what was not synced before is for the next run
to rewrite.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from pathlib import Path

from msconv_runtime.artifact import sync_directory
from msconv_runtime.errors import MsconvError, ResourceError

from ..layout.constants import Constant
from ..layout.files import file_name
from ..layout.plan import Plan

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start writing dirty pages out, do not wait
_libc = ctypes.CDLL(None, use_errno=True)
_START_EVERY = 16 << 20


def whole(root: Path, plan: Plan, published: bool = False) -> bool:
    """True if every rank file is there with all its space: under its final name, or (unless `published`) as
    it is while being written."""
    for rank in plan.mesh.ranks:
        for i, file in enumerate(plan.files):
            final = root / file_name(rank, i)
            tmp = final.with_name(final.name + ".tmp")
            places = (final,) if published else (final, tmp)
            if not any(p.is_file() and p.stat().st_size == file.size for p in places):
                return False
    return True


class Outputs:
    """All files of all ranks, as `*.tmp`.  Threads may write at once; places never overlap.  After an error of
    `write` or `sync`, `sync` raises it again."""

    def __init__(self, root: Path, plan: Plan, fresh: bool, besides: int = 0) -> None:
        self.root, self.plan, self.fresh, self.besides = root, plan, fresh, besides
        self._fds: dict[tuple[int, int], int] = {}
        self._unstarted: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._error: MsconvError | None = None

    def __enter__(self) -> Outputs:
        (self.root / "weights").mkdir(parents=True, exist_ok=True)
        keys = [(rank, i) for rank in self.plan.mesh.ranks for i in range(len(self.plan.files))]
        for rank, i in keys:
            final = self.root / file_name(rank, i)
            if self.fresh:
                final.unlink(missing_ok=True)
                self._tmp(rank, i).unlink(missing_ok=True)
            elif final.exists():  # a crash after some were published
                final.replace(self._tmp(rank, i))
        need = self.besides + sum(self.plan.files[i].size for _, i in keys)
        have = sum(self._allocated(rank, i) for rank, i in keys)
        free = shutil.disk_usage(self.root).free
        if need - have > free:
            raise out_of_space(self.root, need - have, free)
        try:
            for rank, i in keys:
                fd = os.open(self._tmp(rank, i), os.O_RDWR | os.O_CREAT, 0o644)
                self._fds[rank, i] = fd
                file = self.plan.files[i]
                os.posix_fallocate(fd, 0, file.size)
                self.write(rank, i, 0, memoryview(file.header))
        except OSError as e:
            self.close()
            raise disk_error(e, self.root, need - have) from None
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def write(self, rank: int, file: int, offset: int, data: memoryview) -> None:
        """Put bytes at their final place."""
        fd = self._fds[rank, file]
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(fd, data[done : done + (1 << 30)], offset + done)
        except OSError as e:  # NFS says here what a sync would have said, and the sync says nothing then
            self._error = disk_error(e, self._tmp(rank, file), len(data) - done)
            raise self._error from None
        with self._lock:
            waiting = self._unstarted.get((rank, file), 0) + len(data)
            start = waiting >= _START_EVERY
            self._unstarted[rank, file] = 0 if start else waiting
        if start:  # keep the disk busy now, so that the next sync has little left to do
            _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)

    def write_constant(self, constant: Constant, rank: int) -> bytes:
        data = self.plan.constant_bytes(constant, rank)
        tensor = self.plan.tensors[constant.tensor]
        header = len(self.plan.files[tensor.file].header)
        self.write(rank, tensor.file, header + tensor.begin, memoryview(data))
        return data

    def sync(self) -> None:
        """Everything written so far is on the disk; its pages leave the page cache."""
        if self._error:
            raise self._error from None
        for (rank, i), fd in self._fds.items():  # all of them: what a file lost would else stop the next run
            try:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as e:
                self._error = self._error or disk_error(e, self._tmp(rank, i), 0)
        if self._error:
            raise self._error from None

    def publish(self) -> None:
        """Give every file its final name.  Call after the last `sync`."""
        self.close()
        for rank in self.plan.mesh.ranks:
            for i in range(len(self.plan.files)):
                self._tmp(rank, i).replace(self.root / file_name(rank, i))
        sync_directory(self.root / "weights")

    def _tmp(self, rank: int, i: int) -> Path:
        return self.root / (file_name(rank, i) + ".tmp")

    def _allocated(self, rank: int, i: int) -> int:
        try:
            return self._tmp(rank, i).stat().st_blocks * 512
        except OSError:
            return 0


def out_of_space(root: Path, need: int, free: int) -> ResourceError:
    return ResourceError(
        f"{root}: not enough disk: {need:,} bytes are still needed, {free:,} are free, "
        f"{max(0, need - free):,} are missing.",
        "Free that much or give another --output, then run the same command again: it resumes.",
    )


def disk_error(e: OSError, where: Path, need: int) -> MsconvError:
    """What an OSError while writing means to a person."""
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

"""The rank files while they are being written: preallocated, written at final offsets, renamed when whole.

A write or a sync that failed is final.  Linux reports pages that it could not write out once, and drops them: the
next sync would succeed without them.  So none is tried again, and what was not synced before is for the next run
to rewrite.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from msconv_runtime.artifact import sync_directory
from msconv_runtime.errors import MsconvError

from ..layout.constants import Constant
from ..layout.files import file_name
from ..layout.plan import Plan
from ..workspace.disk import disk_error, out_of_space

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start writing dirty pages out, do not wait
_libc = ctypes.CDLL(None, use_errno=True)
_START_EVERY = 16 << 20


def has_all_files(files: RankFiles, plan: Plan, only_published: bool = False) -> bool:
    """Whether every rank file is there with all its space: under its final name, or (unless `only_published`)
    under the one it has while it is written."""
    for rank, i in files.keys:
        final = files.final(rank, i)
        places = (final,) if only_published else (final, files.temporary(rank, i))
        if not any(p.is_file() and p.stat().st_size == plan.files[i].size for p in places):
            return False
    return True


@dataclass(frozen=True)
class RankFiles:
    """Where the files of all ranks are: `parts` of each of `ranks`, in the directory `root`.  A value: any process
    that sees the directory can open it."""

    root: Path
    ranks: int
    parts: int

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(rank, number of the file) of every file."""
        return [(rank, i) for rank in range(self.ranks) for i in range(self.parts)]

    def final(self, rank: int, i: int) -> Path:
        return self.root / file_name(rank, i)

    def temporary(self, rank: int, i: int) -> Path:
        """The file's name while it is written."""
        return self.root / (file_name(rank, i) + ".tmp")

    def open(self) -> Outputs:
        """The files that `allocate` made, to be written in this process too.  Raises MsconvError."""
        try:
            return Outputs(self)
        except OSError as e:
            raise disk_error(e, self.root, 0) from None


def allocate(files: RankFiles, plan: Plan, is_fresh: bool, extra_bytes: int = 0) -> Outputs:
    """Make all files, with all their space and their headers; what an earlier run wrote stays, unless `is_fresh`.
    `extra_bytes` must find room too.  Raises ResourceError."""
    (files.root / "weights").mkdir(parents=True, exist_ok=True)
    for rank, i in files.keys:
        final, temporary = files.final(rank, i), files.temporary(rank, i)
        if is_fresh:
            final.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
        elif final.exists():  # a crash after some were published
            final.replace(temporary)
    need = extra_bytes + sum(plan.files[i].size for _, i in files.keys)
    have = sum(_allocated_bytes(files.temporary(rank, i)) for rank, i in files.keys)
    free = shutil.disk_usage(files.root).free
    if need - have > free:
        raise out_of_space(files.root, need - have, free)
    try:
        return Outputs(files, plan)
    except OSError as e:
        raise disk_error(e, files.root, need - have) from None


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


class Outputs:
    """All files of all ranks, open as `*.tmp`.  Threads may write at once; places never overlap.  After an error
    of `write` or `sync`, `sync` raises it again."""

    def __init__(self, files: RankFiles, plan: Plan | None = None) -> None:
        """`plan`: make the files, with their space and headers; None, they are there.  Raises OSError."""
        self.files = files
        self._fds: dict[tuple[int, int], int] = {}
        self._unstarted: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._error: MsconvError | None = None
        try:
            for rank, i in files.keys:
                path = files.temporary(rank, i)
                # Not for reading, where others write too: NFS would read the page around what is written, and
                # write all of it, with others' bytes as it read them.
                flags = os.O_RDWR | os.O_CREAT if plan else os.O_WRONLY
                fd = self._fds[rank, i] = os.open(path, flags, 0o644)
                if plan:
                    os.posix_fallocate(fd, 0, plan.files[i].size)
                    self.write(rank, i, 0, memoryview(plan.files[i].header))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Outputs:
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
            self._error = disk_error(e, self.files.temporary(rank, file), len(data) - done)
            raise self._error from None
        with self._lock:
            waiting = self._unstarted.get((rank, file), 0) + len(data)
            start = waiting >= _START_EVERY
            self._unstarted[rank, file] = 0 if start else waiting
        if start:  # keep the disk busy now, so that the next sync has little left to do
            _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)

    def write_constant(self, plan: Plan, constant: Constant, rank: int) -> None:
        """Put a small tensor in which ranks differ at its place."""
        tensor = plan.tensors[constant.tensor]
        header = len(plan.files[tensor.file].header)
        self.write(rank, tensor.file, header + tensor.begin, memoryview(plan.constant_bytes(constant, rank)))

    def sync(self) -> None:
        """Everything written so far is on the disk; its pages leave the page cache."""
        if self._error:
            raise self._error from None
        for (rank, i), fd in self._fds.items():  # all of them: what a file lost would else stop the next run
            try:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as e:
                self._error = self._error or disk_error(e, self.files.temporary(rank, i), 0)
        if self._error:
            raise self._error from None

    def publish(self) -> None:
        """Give every file its final name.  Call after the last `sync`."""
        self.close()
        for rank, i in self.files.keys:
            self.files.temporary(rank, i).replace(self.files.final(rank, i))
        sync_directory(self.files.root / "weights")

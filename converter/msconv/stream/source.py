"""Reading source tensors by rows, and noticing when a file changes under our hands."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from msconv_runtime.errors import CheckpointError

from ..checkpoint.directory import ShardFile
from ..layout.model import TensorInfo

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as it was when the plan was made: size in bytes, time of its last change."""

    path: str
    size: int
    mtime_ns: int

    def __str__(self) -> str:
        return f"{self.path} {self.size} {self.mtime_ns}"


class Source(Protocol):
    """Where rows of source tensors come from.  `is_arriving`: its files come while others are read, one after
    another."""

    is_arriving: bool = False

    def expect(self, names: Iterable[str], progress: Progress) -> None:
        """These tensors will be read, about in this order; one that is named twice, twice.  `progress` gets the
        bytes that come from elsewhere."""
        return

    def read(self, info: TensorInfo, begin: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from `begin` on (both in bytes)."""

    def release(self, info: TensorInfo) -> None:
        """The tensor is not needed again: its pages may leave the page cache."""

    def moved(self, names: Iterable[str]) -> None:
        """What these tensors were read for is durably in its place: no later run will read them for it either."""
        return

    def interrupt(self) -> None:
        """Reads that wait for something raise Stopped."""
        return

    def check_unchanged(self) -> None:
        """Raises CheckpointError if any file changed since the plan was made."""

    def elsewhere(self) -> SourceLocation:
        """What a process in another place reads the same from, by whole paths.  All that is expected is there."""

    def close(self) -> None: ...


class SourceLocation(Protocol):
    """Where a source is: a value of paths, sizes, names and revisions, which any process can open for itself."""

    def open(self) -> Source:
        """Begin to read.  Nothing is read yet."""

    def states(self) -> tuple[FileState, ...]:
        """The files that it reads, by whole paths; none where they are still to come."""
        return ()


@dataclass(frozen=True)
class DirectoryShards(SourceLocation):
    """The shards of a local checkpoint, by their names."""

    files: Mapping[str, ShardFile]

    def open(self) -> Source:
        return DirectorySource(self.files)

    def states(self) -> tuple[FileState, ...]:
        return tuple(FileState(str(f.path.absolute()), f.size, f.mtime_ns) for f in self.files.values())


class DirectorySource(Source):
    """The shards of a local checkpoint, read with pread (a mapping would keep its pages)."""

    def __init__(self, files: Mapping[str, ShardFile]) -> None:
        self._files = files
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, info: TensorInfo, begin: int, out: memoryview) -> None:
        fd = self._open(info.file)
        read_exactly(fd, out, info.offset + begin, self._files[info.file].path)

    def release(self, info: TensorInfo) -> None:
        os.posix_fadvise(self._open(info.file), info.offset, info.nbytes, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        for file in self._files.values():
            try:
                stat = file.path.stat()
            except OSError as e:
                raise CheckpointError(f"{file.path}: disappeared during conversion: {e.strerror}.") from None
            if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(
                    f"{file.path}: changed during conversion (size {file.size} -> {stat.st_size}, "
                    f"modified {(stat.st_mtime_ns - file.mtime_ns) / 1e9:+.3f} s).",
                    "Let the download finish, then convert again with --force.",
                )

    def elsewhere(self) -> SourceLocation:
        return DirectoryShards({n: replace(f, path=f.path.absolute()) for n, f in self._files.items()})

    def forget(self, name: str) -> None:
        """Close a file that is not read again."""
        with self._lock:
            if name in self._fds:
                os.close(self._fds.pop(name))

    def close(self) -> None:
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._fds:
                path = self._files[name].path
                try:
                    self._fds[name] = os.open(path, os.O_RDONLY)
                except OSError as e:
                    raise CheckpointError(f"{path}: cannot be read: {e.strerror}.") from None
                os.posix_fadvise(self._fds[name], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._fds[name]


def read_exactly(fd: int, out: memoryview, offset: int, path: Path) -> None:
    """Fill `out` from `offset`.  Raises CheckpointError if the file ends before."""
    done = 0
    while done < len(out):
        try:
            n = os.preadv(fd, [out[done:]], offset + done)
        except OSError as e:
            raise CheckpointError(f"{path}: reading at byte {offset + done} failed: {e.strerror}.") from None
        if n == 0:
            raise CheckpointError(
                f"{path}: ended at byte {offset + done} while {len(out) - done} more were expected: "
                "it became shorter during conversion.",
                "Let the download finish, then convert again.",
            )
        done += n

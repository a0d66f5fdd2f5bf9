"""Reading source tensors out of shards that are still being downloaded: each read waits for its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from msconv_runtime.artifact import digest_bytes
from msconv_runtime.errors import CheckpointError

from ..checkpoint.directory import ShardFile
from ..checkpoint.downloads import Downloads
from ..checkpoint.headers import PREFIX_BYTES, header_length
from ..checkpoint.hub import Repository
from ..checkpoint.remote import Cancelled, Progress
from ..layout.model import TensorInfo
from .source import DirectorySource, Source, SourceLocation
from .transform import Stopped


@dataclass(frozen=True)
class HubShards(SourceLocation):
    """The shards of a repository at a commit, and the tensors that its headers name."""

    repository: Repository
    files: Mapping[str, ShardFile]
    tensors: Mapping[str, TensorInfo]

    def open(self) -> Source:
        return HubSource(self)


class HubSource(Source):
    """The shards of a repository.  Where its own directory is used, those that were read are deleted."""

    is_arriving = True

    def __init__(self, shards: HubShards) -> None:
        self._planned, self._tensors = shards.files, shards.tensors
        self._downloads = Downloads(shards.repository)
        self._own = shards.repository.own
        self._here: dict[str, ShardFile] = {}
        self._inner = DirectorySource(self._here)
        self._unread = Counter[str]()  # by file: how often its tensors are still to be read

    def expect(self, names: Iterable[str], progress: Progress) -> None:
        order: list[str] = []
        for name in names:
            file = self._tensors[name].file
            self._unread[file] += 1
            order.append(file)
        self._downloads.expect(order, progress)

    def read(self, info: TensorInfo, begin: int, out: memoryview) -> None:
        if info.file not in self._here:
            self._take(info.file)
        self._inner.read(info, begin, out)

    def release(self, info: TensorInfo) -> None:
        self._inner.release(info)

    def moved(self, names: Iterable[str]) -> None:
        for name in names:
            file = self._tensors[name].file
            self._unread[file] -= 1
            if (
                self._own
                and self._unread[file] <= 0
                and file in self._here
                and self._here[file].path.parent == self._own
            ):
                del self._here[file]
                self._inner.forget(file)
                self._downloads.delete(file)

    def interrupt(self) -> None:
        self._downloads.cancel()

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()

    def elsewhere(self) -> SourceLocation:
        for name in self._unread:
            if name not in self._here:
                self._take(name)
        return self._inner.elsewhere()

    def close(self) -> None:
        self._downloads.stop()
        self._inner.close()

    def _take(self, name: str) -> None:
        """Wait for a shard, and hold it against the header that was planned with."""
        try:
            path = self._downloads.wait(name)
        except Cancelled:
            raise Stopped from None
        planned, stat = self._planned[name], path.stat()
        if stat.st_size != planned.size or _header_digest(path, stat.st_size) != planned.header_digest:
            raise CheckpointError(
                f"{path}: has another header than the hub sent when it was asked for the header alone.",
                "Delete this file and run the same command again.",
            )
        self._here[name] = replace(planned, path=path, mtime_ns=stat.st_mtime_ns)


def _header_digest(path: Path, size: int) -> str:
    with path.open("rb") as f:
        prefix = f.read(PREFIX_BYTES)
        return digest_bytes(prefix + f.read(header_length(prefix, path, size)))

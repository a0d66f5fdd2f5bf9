"""Reading every byte once, several shards at a time, in buffers of fixed size."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import xxhash

from msconv_runtime.dtypes import DTYPES

from ..checkpoint.directory import ShardFile
from ..checkpoint.remote import hasher
from ..layout.model import TensorInfo
from ..stream.left_out import difference
from ..stream.source import read_exactly
from .blocks import ELEMENT
from .files import Inventory, known_digest
from .findings import Findings
from .names import Known
from .values import Array, Surroundings, as_numbers, check_for

BLOCK_BYTES = 2 << 20
SMALL_BYTES = 64 << 20  # of a tensor that is read whole

Progress = Callable[[int], None]


class Stopped(Exception):
    """Another thread failed, or somebody does not want to wait."""


def _place(info: TensorInfo) -> tuple[str, int]:
    """What tells a tensor, whatever it is called."""
    return info.file, info.offset


class Reading:
    """All shards of an inventory.  `digests`: how many had a digest to compare with."""

    def __init__(self, found: Inventory, known: Known, findings: Findings, progress: Progress) -> None:
        self.found, self.known, self.findings, self.progress = found, known, findings, progress
        block = next((f.scale_block for f in known.formats if f.element == ELEMENT), None)
        self._surroundings = Surroundings(found.tensors, self._small, block, known.dtype)
        self._twins = {_place(info): "" for _, *both in known.twins for info in both}
        self.digests = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._by_file: dict[str, list[TensorInfo]] = {}
        for info in found.tensors.values():
            self._by_file.setdefault(info.file, []).append(info)

    def run(self, jobs: int) -> None:
        """Read it all.  Raises MsconvError, and what the system raised."""
        with ThreadPoolExecutor(jobs, "lint") as pool:
            order = sorted(self.found.files, key=lambda name: -self.found.files[name].size)
            futures = [pool.submit(self._shard, name) for name in order]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done():
                        future.result()
            finally:
                self._stop.set()
        for future in futures:
            future.result()
        self._compare_twins()

    def _compare_twins(self) -> None:
        for entry, left_out, twin in self.known.twins:
            is_alike = (left_out.dtype, left_out.shape) == (twin.dtype, twin.shape)
            if not is_alike or self._twins[_place(left_out)] != self._twins[_place(twin)]:
                words, hint = difference(entry)
                self.findings.add("error", "twins", f"{words}. {hint}", [entry.name])

    def _shard(self, name: str) -> None:
        file = self.found.files[name]
        etag = known_digest(file.path)
        digest = hasher(etag, file.size) if etag else None
        fd = os.open(file.path, os.O_RDONLY)
        try:
            infos = sorted(self._by_file.get(name, ()), key=lambda i: (i.offset, i.nbytes))
            begin = infos[0].offset if infos else file.size
            for piece in self._pieces(fd, file, 0, begin, 1):
                if digest:
                    digest.update(piece.data)
            for info in infos:
                check = check_for(info, self._surroundings, self.findings)
                twin = xxhash.xxh3_128() if _place(info) in self._twins else None
                item = DTYPES[info.dtype].nbytes
                for piece in self._pieces(
                    fd, file, info.offset, info.nbytes, item * (check.width if check else 1)
                ):
                    if digest:
                        digest.update(piece.data)
                    if twin:
                        twin.update(piece.data)
                    if check:
                        check.see(piece.view(DTYPES[info.dtype].bits))
                if check:
                    check.end()
                if twin:
                    self._twins[_place(info)] = twin.hexdigest()
                os.posix_fadvise(fd, info.offset, info.nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        if digest:
            with self._lock:
                self.digests += 1
            if digest.hexdigest() != etag:
                text = f"its digest is {digest.hexdigest()}, and the hub's is {etag}: download it again"
                self.findings.add("error", "digest", text, [name])

    def _pieces(self, fd: int, file: ShardFile, begin: int, nbytes: int, together: int) -> Iterable[Array]:
        """[begin, begin + nbytes) as bytes, whole runs of `together` bytes at a time."""
        step = max(1, BLOCK_BYTES // max(1, together)) * together
        buffer = np.empty(min(step, nbytes) if together else 0, np.uint8)
        done = 0
        while done < nbytes and together:
            if self._stop.is_set():
                raise Stopped
            piece = buffer[: min(step, nbytes - done)]
            read_exactly(fd, piece.data, begin + done, file.path)
            yield piece
            done += len(piece)
            self.progress(len(piece))

    def _small(self, name: str) -> Array | None:
        """A small tensor, whole, wherever it is; None if there is none."""
        info = self.found.tensors.get(name)
        if info is None or info.nbytes > SMALL_BYTES:
            return None
        data = np.empty(info.nbytes, np.uint8)
        path: Path = self.found.files[info.file].path
        fd = os.open(path, os.O_RDONLY)
        try:
            read_exactly(fd, data.data, info.offset, path)
        finally:
            os.close(fd)
        return as_numbers(data.view(DTYPES[info.dtype].bits), info)

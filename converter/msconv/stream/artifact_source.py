"""Reading source tensors back out of an artifact: the boxes that cut them, read the other way.

Every part that is read is hashed on the way and compared with the manifest at the end: damage is not passed on.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import xxhash

from msconv_runtime.artifact import Weights, digest_of
from msconv_runtime.errors import ArtifactError
from msconv_runtime.integrity import tensor_digest

from ..layout import dtypes
from ..layout.cuts import Box, matrix
from ..layout.model import TensorInfo
from ..layout.plan import Move, Plan, file_name
from .blocks import pad_hash
from .source import read_exactly


class ArtifactSource:
    """A plan's outputs, seen as its sources.  `plan` is the one the artifact was written by."""

    def __init__(self, root: Path, plan: Plan, weights: Weights) -> None:
        self.root, self.plan, self.weights = root, plan, weights
        self._fds: dict[Path, int] = {}
        self._stats = {p: p.stat() for p in (root / f.path for f in weights.files)}
        self._lock = threading.Lock()
        self._hashes: dict[tuple[int, int, int], tuple[xxhash.xxh3_128, int]] = {}

    def read(self, info: TensorInfo, begin: int, out: memoryview) -> None:
        """Rows [begin, begin + len(out)) of the tensor, both whole rows, in bytes."""
        move = self.plan.moves[info.name][0]
        _, cols = matrix(info.shape)
        item = dtypes.SIZES[info.dtype]
        pitch = cols * item
        first, last = begin // pitch, (begin + len(out)) // pitch
        whole = np.frombuffer(out, np.uint8).reshape(-1, pitch)
        for rank, box in self._owners(info, move):
            top, bottom = max(first, box.row), min(last, box.row + box.rows)
            if top >= bottom:
                continue
            width = box.cols * item
            offset = (top - box.row) * width
            size = (bottom - top) * width
            if box.cols == cols:
                piece = out[(top - first) * pitch : (bottom - first) * pitch]
                self._read(rank, move, offset, piece)
            else:
                piece = memoryview(bytearray(size))
                self._read(rank, move, offset, piece)
                left = box.col * item
                whole[top - first : bottom - first, left : left + width] = np.frombuffer(piece, np.uint8).reshape(
                    -1, width
                )

    def release(self, info: TensorInfo) -> None:
        move = self.plan.moves[info.name][0]
        tensor = self.plan.tensors[move.tensor]
        for rank, _ in self._owners(info, move):
            fd = self._open(self.root / file_name(rank, tensor.file))
            os.posix_fadvise(fd, self.plan.part_offset(move), tensor.parts[move.part], os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        for path, stat in self._stats.items():
            try:
                now = path.stat()
            except OSError as e:
                raise ArtifactError(f"{path}: disappeared while it was resharded: {e.strerror}.") from None
            if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise ArtifactError(f"{path}: changed while it was resharded.", "Run it again with --force.")
        bad = [
            f"  {file_name(rank, tensor.file)}: {tensor.name}"
            for i, tensor in enumerate(self.plan.tensors)
            for rank in self.plan.mesh.ranks
            if self._digest(rank, i) != self.weights.tensors[i].digests[rank]
        ]
        if bad:
            raise ArtifactError(
                f"{self.root}: these tensors are not what its manifest says:\n" + "\n".join(bad[:20]),
                "Copy the artifact again, or convert the checkpoint again.",
            )

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _owners(self, info: TensorInfo, move: Move) -> list[tuple[int, Box]]:
        """One rank for each rectangle: where ranks share one, the first of them."""
        owners: dict[Box, int] = {}
        for rank in self.plan.mesh.ranks:
            for box in self.plan.boxes(info.name, move, rank):
                owners.setdefault(box, rank)
        return [(rank, box) for box, rank in owners.items()]

    def _read(self, rank: int, move: Move, offset: int, out: memoryview) -> None:
        path = self.root / file_name(rank, self.plan.tensors[move.tensor].file)
        read_exactly(self._open(path), out, self.plan.part_offset(move) + offset, path)
        key = (rank, move.tensor, move.part)
        with self._lock:
            hasher, done = self._hashes.setdefault(key, (xxhash.xxh3_128(), 0))
        if done == offset:  # blocks of one tensor come in order
            hasher.update(out)
            self._hashes[key] = (hasher, done + len(out))

    def _digest(self, rank: int, tensor: int) -> str:
        """Of one rank's tensor: from what was read on the way, else (another rank's copy was read, or an
        earlier run did it) by reading it now."""
        digests = []
        for part, size in enumerate(self.plan.tensors[tensor].parts):
            if (rank, tensor, part) not in self._hashes:
                entry = self.weights.tensors[tensor]
                return tensor_digest(
                    self._open(self.root / file_name(rank, entry.file)), entry, bytearray(8 << 20)
                )
            hasher, done = self._hashes[rank, tensor, part]
            hasher = hasher.copy()
            pad_hash(hasher, size - done)
            digests.append("xxh3:" + hasher.hexdigest())
        return digest_of(digests)

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                try:
                    self._fds[path] = os.open(path, os.O_RDONLY)
                except OSError as e:
                    raise ArtifactError(f"{path}: cannot be read: {e.strerror}.") from None
            return self._fds[path]

"""Reading source tensors back out of an artifact: the boxes that cut them, read the other way.

Every part that is read is hashed on the way and compared with the manifest at the end: damage is not passed on.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from msconv_runtime.artifact import Weights, digest_of
from msconv_runtime.artifact.integrity import tensor_digest
from msconv_runtime.dtypes import DTYPES
from msconv_runtime.errors import ArtifactError

from ..layout.cuts import Box, matrix
from ..layout.files import file_name
from ..layout.model import TensorInfo
from ..layout.plan import Move, Plan
from ..quant.kernels import transpose
from .rank_parts import pad_hash
from .source import FileState, Source, SourceLocation, read_exactly

TRANSPOSE_BYTES = 1 << 20  # of a transposed part, read at a time


@dataclass(frozen=True)
class ArtifactFiles(SourceLocation):
    """An artifact's weights.  `plan`: the one they were written by."""

    root: Path
    plan: Plan
    weights: Weights
    files: tuple[FileState, ...]

    def open(self) -> Source:
        return ArtifactSource(self)

    def states(self) -> tuple[FileState, ...]:
        return tuple(replace(f, path=str((self.root / f.path).absolute())) for f in self.files)


def file_states(root: Path, weights: Weights) -> tuple[FileState, ...]:
    """All weight files as they are now."""
    stats = ((f.path, (root / f.path).stat()) for f in weights.files)
    return tuple(FileState(path, s.st_size, s.st_mtime_ns) for path, s in stats)


class ArtifactSource(Source):
    """A plan's outputs, seen as its sources."""

    def __init__(self, artifact: ArtifactFiles) -> None:
        self._location = artifact
        self.root, self.plan, self.weights = artifact.root, artifact.plan, artifact.weights
        self._planned = artifact.files
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._hashes: dict[tuple[int, int, int], tuple[xxhash.xxh3_128, int]] = {}

    def read(self, info: TensorInfo, begin: int, out: memoryview) -> None:
        """Rows [begin, begin + len(out)) of the tensor, both whole rows, in bytes: whole heads where rows change
        places within them, all rows where matrices are transposed."""
        _, cols = matrix(info.shape)
        item = DTYPES[info.dtype].nbytes
        first = begin // (cols * item)
        rows = np.frombuffer(out, f"u{item}").reshape(-1, cols)
        for move in self.plan.moves[info.name]:
            if move.is_transposed:
                self._read_transposed(info, move, rows)
            elif move.sums_of:
                self._read_sums(move, rows)
            else:
                self._read_rows(info, move, first, rows)

    def _read_rows(self, info: TensorInfo, move: Move, first: int, rows: NDArray[Any]) -> None:
        item = rows.itemsize
        order = self.plan.row_order(move)
        for rank, box, above in self._owners(info, move):
            top, bottom = max(first, box.row), min(first + len(rows), box.row + box.rows)
            if top >= bottom:
                continue
            place = rows[top - first : bottom - first]
            offset = (above + top - box.row) * box.cols * item
            if box.cols == rows.shape[1] and order is None:
                self._read(rank, move, offset, place.reshape(-1).view(np.uint8).data)
                continue
            piece = np.empty((bottom - top, box.cols), rows.dtype)
            self._read(rank, move, offset, piece.reshape(-1).view(np.uint8).data)
            if order is not None:
                heads = piece.reshape(-1, len(order), box.cols)
                piece = heads[:, np.argsort(order)].reshape(piece.shape)
            place[:, box.col : box.col + box.cols] = piece

    def _read_sums(self, move: Move, out: NDArray[Any]) -> None:
        """All ranks' shares together, whole."""
        share, total = np.empty(len(out), np.int32), np.zeros(len(out), np.int64)
        for rank in self.plan.ranks(move):
            self._read(rank, move, 0, share.view(np.uint8).data)
            total += share
        out[:, 0] = total.astype(np.int32).view(out.dtype)

    def _read_transposed(self, info: TensorInfo, move: Move, rows: NDArray[Any]) -> None:
        """Parts are [in, out]: some of their rows at a time become columns."""
        inner, width = self.plan.part_matrix(move)
        step = max(1, TRANSPOSE_BYTES // (width * rows.itemsize))
        for rank, box, _ in self._owners(info, move):
            for at in range(0, inner, step):
                piece = np.empty((min(step, inner - at), width), rows.dtype)
                self._read(rank, move, at * width * rows.itemsize, piece.reshape(-1).view(np.uint8).data)
                place = rows[box.row : box.row + box.rows, box.col + at : box.col + at + len(piece)]
                transpose(piece[:, move.column : move.column + box.rows], place)

    def release(self, info: TensorInfo) -> None:
        for move in self.plan.moves[info.name]:
            tensor = self.plan.tensors[move.tensor]
            for rank, _, _ in self._owners(info, move):
                fd = self._open(self.root / file_name(rank, tensor.file))
                size = tensor.parts[move.part]
                os.posix_fadvise(fd, self.plan.part_offset(move), size, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        for planned in self._planned:
            path = self.root / planned.path
            try:
                now = path.stat()
            except OSError as e:
                raise ArtifactError(f"{path}: disappeared while it was resharded: {e.strerror}.") from None
            if (now.st_size, now.st_mtime_ns) != (planned.size, planned.mtime_ns):
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

    def elsewhere(self) -> SourceLocation:
        return replace(self._location, root=self.root.absolute())

    def close(self) -> None:
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def _owners(self, info: TensorInfo, move: Move) -> list[tuple[int, Box, int]]:
        """(rank, rectangle, rows above it in the rank's part), one rank for each rectangle: where ranks share
        one, the first of them."""
        owners: dict[Box, tuple[int, int]] = {}
        for rank in self.plan.ranks(move):
            above = 0
            for box in self.plan.boxes(info.name, move, rank):
                owners.setdefault(box, (rank, above))
                above += box.rows
        return [(rank, box, above) for box, (rank, above) in owners.items()]

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
        """The digest of one rank's tensor: from what was read on the way, else (another rank's copy was read, or
        an earlier run did it) by reading it now."""
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

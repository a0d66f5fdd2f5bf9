"""Rank files as arrays: mapped, or read into memory; bound without a copy where the type fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, is_float
from ..errors import ArtifactError
from .files import AGAIN, check_size
from .headers import MAX_HEADER_BYTES, differences, header_size
from .opened import Artifact

LoadMode = Literal["mmap", "read"]


class RankWeights:
    """The tensors of one rank.  `mode`: `mmap` touches pages as they are used; `read` copies the files into
    memory first (some driver stacks hang on mapped sources)."""

    def __init__(self, artifact: Artifact, rank: int, mode: LoadMode = "mmap") -> None:
        root = artifact.root
        self.weights = artifact.weights
        if not 0 <= rank < artifact.tp:
            raise ArtifactError(f"{root}: has ranks 0 to {artifact.tp - 1}, not {rank}.")
        self.rank = rank
        self.tensors = {t.name: t for t in self.weights.tensors}
        self._files: list[NDArray[np.uint8]] = []
        for file in self.weights.files:
            if file.rank == rank:
                check_size(root / file.path, file.size)
                data = _load(root / file.path, mode)
                self._refuse_other_table(file.path, data)
                self._files.append(data)

    def _refuse_other_table(self, path: str, data: NDArray[np.uint8]) -> None:
        """Raises ArtifactError if the next file holds other tensors than the manifest says: its digests alone are
        not looked at here, and would not tell."""
        entries = [t for t in self.weights.tensors if t.file == len(self._files)]
        header = data[: min(header_size(entries), MAX_HEADER_BYTES)].tobytes()
        for name, problem in differences(header, entries) if entries else ():
            raise ArtifactError(f"{path}: {f'{name}: ' if name else ''}{problem}.", AGAIN)

    def raw(self, name: str) -> NDArray[Any]:
        """Stored values, no copy.  bfloat16 comes as its bits, uint16."""
        entry = self.tensors[name]
        data = self._files[entry.file][entry.begin : entry.begin + entry.nbytes]
        return data.view(DTYPES[entry.dtype].array).reshape(entry.shape)

    def array(self, name: str, dtype: str) -> tuple[NDArray[Any], bool]:
        """The tensor as `dtype`, and whether that took a cast.  bfloat16 comes as its bits, uint16.

        To float32 a cast is exact; to a 16-bit type it rounds to the nearest, but for scales of codes, which must
        have the value.  int64 holds bits of float32: so products in float16 take their scales.  Raises
        ArtifactError for other integers, and for a scale that would be rounded.
        """
        entry = self.tensors[name]
        raw = self.raw(name)
        if entry.dtype == dtype:
            return raw, False
        if dtype == "int64" and entry.dtype == "float32":
            return raw.view(np.uint32).astype(np.int64), True
        if dtype == "float32" and entry.dtype == "bfloat16":
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32), True
        if not (is_float(dtype) and is_float(entry.dtype)):
            raise ArtifactError(
                f"{name}: stored as {entry.dtype}, wanted as {dtype}.", "Run `msconv compile` on it again."
            )
        values = raw.view(DTYPES[entry.dtype].numpy)
        cast = values.astype(DTYPES[dtype].numpy)
        if self.is_scale(name) and (rounded := values[cast.astype(values.dtype) != values]).size:
            raise ArtifactError(
                f"{name}: {rounded.size} of {values.size} scales, {rounded.flat[0]} the first, are no {dtype} "
                "values, as which the graphs take them: rounded, they would change the products.",
                "Quantise from a bfloat16 checkpoint, or serve it on another target.",
            )
        return cast.view(DTYPES[dtype].array), True

    def is_scale(self, name: str) -> bool:
        """Whether these are scales of a matrix of codes."""
        matrix = self.tensors.get(name.removesuffix("_scale"))
        return name.endswith("_scale") and matrix is not None and matrix.dtype == "int8"


def _load(path: Path, mode: LoadMode) -> NDArray[np.uint8]:
    if mode == "mmap":
        # copy-on-write: MindSpore wants writable memory, the file must not change
        return np.asarray(np.memmap(path, np.uint8, "c"))
    size = path.stat().st_size
    data = np.empty(size, np.uint8)
    view = data.data
    fd = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < size:
            n = os.preadv(fd, [view[done : done + (64 << 20)]], done)
            if n == 0:
                raise ArtifactError(f"{path}: ended at byte {done} of {size}.")
            done += n
    finally:
        os.close(fd)
    return data

"""The codes that a candidate rounded activations to, by sequence and position."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

Codes = NDArray[np.int8]
Ids = NDArray[np.int64]
Rows = tuple[NDArray[np.intp], NDArray[np.intp]]  # sequence and position of each
Place = tuple[int, int]

DIVIDED = ("o_proj.weight", "down_proj.weight")  # ranks have columns of these: each rounds its own


def is_divided(matrix: str) -> bool:
    return matrix.endswith(DIVIDED)


@dataclass
class Recorded:
    """One input.  `codes` [S, L, K] with `seen` [S, L]; or, where each chosen expert has a row of its own,
    [S, L, k, K] with `seen` [S, L, k]."""

    codes: Codes
    seen: NDArray[np.bool_]


@dataclass
class Record:
    """What all calls of a candidate gave.  `inputs[(matrix, part)]`: `part` is a rank's share of the columns where
    ranks divide them, else 0; then all ranks must have the same codes, and `apart` says where the first have not.
    `chosen[experts]` [S, L, k]: the numbers of the experts, by the name before `gate_up_proj` and `down_proj`.

    `shape`: (S, L), sequences and the longest of them.  `experts`: of the model, divided over `ep` groups.
    """

    shape: tuple[int, int]
    tp: int
    ep: int = 1
    experts: int = 0
    inputs: dict[tuple[str, int], Recorded] = field(default_factory=dict)
    chosen: dict[str, Ids] = field(default_factory=dict)
    apart: str = ""
    _step: list[tuple[str, int, Codes, Ids | None]] = field(default_factory=list)

    def begin(self) -> None:
        """A call begins: what one before it left without a place is forgotten."""
        self._step = []

    def saw(self, rank: int, matrix: str, codes: torch.Tensor, ids: torch.Tensor | None) -> None:
        """One product of a call: codes [T, K]; of experts' matrices codes [T, k, K] with ids [T, k].  Rows of
        experts that this rank does not have may hold anything."""
        found = codes.to(torch.int8).numpy().copy()
        self._step.append((matrix, rank, found, None if ids is None else ids.long().numpy().copy()))

    def place(self, places: list[Place], phase: str) -> None:
        """The call that has just ended computed these tokens, in this order."""
        first, second = np.array(places, np.intp).reshape(-1, 2).T
        for matrix, rank, codes, ids in self._step:
            where = f"{matrix} on rank {rank} in {phase}"
            if len(codes) != len(places):
                self._say(f"{where}: {len(codes)} rows of codes for {len(places)} tokens")
            elif ids is None:
                self._put(matrix, rank if is_divided(matrix) else 0, codes, (first, second), where)
            else:
                self._put_experts(matrix, rank, codes, ids, (first, second), where)
        self._step = []

    def _put(self, matrix: str, part: int, codes: Codes, at: Rows, where: str) -> None:
        entry = self._entry((matrix, part), (), codes.shape[-1])
        again = entry.seen[at]
        differs = again & (entry.codes[at] != codes).any(1)
        if differs.any():
            row = int(np.flatnonzero(differs)[0])
            column = int(np.flatnonzero(entry.codes[at][row] != codes[row])[0])
            self._say(
                f"{where}: the code of sequence {at[0][row]}, position {at[1][row]}, column {column} is "
                f"{codes[row, column]}, and {entry.codes[at][row, column]} on another rank with the same input"
            )
        entry.codes[at] = np.where(again[:, None], entry.codes[at], codes)
        entry.seen[at] = True

    def _put_experts(self, matrix: str, rank: int, codes: Codes, ids: Ids, at: Rows, where: str) -> None:
        group = self.tp // self.ep  # ranks that share an expert
        mine = ids // (self.experts // self.ep) == rank // group
        name = matrix.rpartition("experts.")[0]
        chosen = self.chosen.setdefault(name, np.full((*self.shape, ids.shape[1]), -1, np.int64))
        before = chosen[at]
        if ((before >= 0) & (before != ids)).any():
            self._say(f"{where}: chooses other experts than another rank with the same input")
        chosen[at] = ids
        for slot in range(ids.shape[1]):
            rows = mine[:, slot]
            here = (at[0][rows], at[1][rows])
            if not is_divided(matrix):  # the token's own row, whatever expert takes it
                self._put(matrix, 0, codes[rows, slot], here, where)
                continue
            entry = self._entry((matrix, rank % group), (ids.shape[1],), codes.shape[-1])
            entry.codes[(*here, slot)] = codes[rows, slot]
            entry.seen[(*here, slot)] = True

    def _entry(self, key: tuple[str, int], slots: tuple[int, ...], width: int) -> Recorded:
        if key not in self.inputs:
            shape = (*self.shape, *slots)
            self.inputs[key] = Recorded(np.zeros((*shape, width), np.int8), np.zeros(shape, np.bool_))
        return self.inputs[key]

    def _say(self, problem: str) -> None:
        self.apart = self.apart or problem

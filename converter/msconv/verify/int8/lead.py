"""Led rounding: the reference takes the candidate's code where its own quotient is a tie, and nowhere else.

Rounding is discontinuous: noise of float32 in the seventh digit flips some codes in a million, and each flip moves
logits by 1e-2.  A flip next to a tie is explained by that noise; any other difference is a fault, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.artifact.consistency import MOST_LED  # measured 2e-5 and less

from .arithmetic import Quotients
from .codes import Record

TIE = 2e-3  # how far beyond the middle between two codes: noise of a quotient is 127 * some 1e-6


@dataclass
class Judged:
    """One input, by token [S, L]: how many codes were compared, how many were led, and how many are unexplained.
    `column`, `own`, `theirs` [S, L]: of the first unexplained in each token's row."""

    compared: NDArray[np.int64]
    led: NDArray[np.int64]
    unexplained: NDArray[np.int64]
    column: NDArray[np.int64]
    own: NDArray[np.float64]
    theirs: NDArray[np.int64]

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Judged:
        def count() -> NDArray[np.int64]:
            return np.zeros(shape, np.int64)

        return cls(count(), count(), count(), count(), np.zeros(shape), count())


@dataclass
class Verdict:
    """Of all codes of tokens whose routing is decided.  `place`: of the first unexplained one, in the order of the
    reference.  `groups`: (compared, led) of each layer's `self_attn` and `mlp`."""

    compared: int = 0
    led: int = 0
    unexplained: int = 0
    place: str = ""
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.led / self.compared if self.compared else 0.0

    @property
    def ok(self) -> bool:
        return self.compared > 0 and not self.unexplained and not self.place and self.share < MOST_LED


class Lead:
    """Leads one pass of the reference over sequences, or lets it round by itself while `record` is None."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.judged: dict[tuple[str, int], Judged] = {}
        self._places = torch.arange(0)  # of the pass's rows among the record's, [S * L]

    def begin(self, record: Record | None, lengths: Sequence[int] | None = None) -> None:
        """`lengths`: of sequences whose tokens are the rows, one after another; None: there are [S, L] rows."""
        self.record, self.judged = record, {}
        if record is not None:
            count, longest = record.shape
            of_each = [longest] * count if lengths is None else lengths
            self._places = torch.cat([i * longest + torch.arange(n) for i, n in enumerate(of_each)])

    def codes(self, matrix: str, part: int, quotients: Quotients) -> torch.Tensor:
        """The codes to go on with, int8 [T, K], for an input of one row a token."""
        own = quotients.codes
        if self.record is None:
            return own
        entry = self.record.inputs.get((matrix, part))
        self.judged[matrix, part] = Judged.of(self.record.shape)  # matrices that share an input ask several times
        if entry is None or entry.codes.ndim != 3 or entry.codes.shape[-1] != own.shape[1]:
            theirs, seen = own, torch.zeros(len(own), dtype=torch.bool)
        else:
            theirs = torch.from_numpy(entry.codes.reshape(-1, own.shape[1]))[self._places]
            seen = torch.from_numpy(entry.seen.reshape(-1))[self._places]
        return self._judge(matrix, part, self._places, quotients.exact, own, theirs, seen)

    def codes_of_expert(
        self, matrix: str, part: int, expert: int, rows: torch.Tensor, quotients: Quotients
    ) -> torch.Tensor:
        """The same for rows [N] of tokens that one expert takes, int8 [N, K]."""
        own = quotients.codes
        if self.record is None:
            return own
        places = self._places[rows]
        entry = self.record.inputs.get((matrix, part))
        chosen = self.record.chosen.get(matrix.rpartition("experts.")[0])
        if entry is None or chosen is None or entry.codes.ndim != 4 or entry.codes.shape[-1] != own.shape[1]:
            theirs, seen = own, torch.zeros(len(own), dtype=torch.bool)
        else:
            ids = torch.from_numpy(chosen.reshape(-1, chosen.shape[-1]))[places]
            slot = (ids == expert).to(torch.uint8).argmax(1)
            theirs = torch.from_numpy(entry.codes.reshape(-1, *entry.codes.shape[2:]))[places, slot]
            seen = torch.from_numpy(entry.seen.reshape(-1, entry.seen.shape[-1]))[places, slot]
            seen = seen & (ids == expert).any(1)
        return self._judge(matrix, part, places, quotients.exact, own, theirs, seen)

    def _judge(
        self,
        matrix: str,
        part: int,
        places: torch.Tensor,
        exact: torch.Tensor,
        own: torch.Tensor,
        theirs: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """`places` [N]: which tokens these are.  `seen` [N]: whether the candidate has codes of them."""
        assert self.record is not None
        judged = self.judged.setdefault((matrix, part), Judged.of(self.record.shape))
        differs = (theirs != own) & seen[:, None]
        led = differs & ((theirs.double() - exact).abs() < 0.5 + TIE)  # the other one beside the middle
        wrong = (differs & ~led) | ~seen[:, None]
        where = places.numpy()
        np.add.at(judged.compared.reshape(-1), where, own.shape[1])
        np.add.at(judged.led.reshape(-1), where, led.sum(1).numpy())
        np.add.at(judged.unexplained.reshape(-1), where, wrong.sum(1).numpy())
        bad = wrong.any(1)
        if bad.any():
            first = wrong[bad].to(torch.uint8).argmax(1)
            at = places[bad].numpy()
            judged.column.reshape(-1)[at] = first.numpy()
            judged.own.reshape(-1)[at] = exact[bad, first].numpy()
            judged.theirs.reshape(-1)[at] = theirs[bad, first].to(torch.int64).numpy()
        return torch.where(led, theirs, own)

    def verdict(self, decided: list[int], lengths: list[int]) -> Verdict:
        """Sum up over each sequence's tokens before `decided`.  Inputs that the candidate rounded and the
        reference did not are a difference too."""
        assert self.record is not None
        found = Verdict()
        judged_rows = np.zeros(self.record.shape, np.bool_)
        for i, (most, length) in enumerate(zip(decided, lengths, strict=True)):
            judged_rows[i, : min(most, length)] = True
        for (matrix, part), judged in self.judged.items():
            compared, led = (int(c[judged_rows].sum()) for c in (judged.compared, judged.led))
            wrong = np.where(judged_rows, judged.unexplained, 0)
            found.compared += compared
            found.led += led
            found.unexplained += int(wrong.sum())
            group = ".".join(matrix.split(".")[:4])
            before = found.groups.get(group, (0, 0))
            found.groups[group] = (before[0] + compared, before[1] + led)
            if wrong.any() and not found.place:
                found.place = self._place(matrix, part, judged, wrong)
        if odd := sorted({m for m, _ in self.record.inputs} - {m for m, _ in self.judged}):
            found.place = found.place or f"{odd[0]}: the candidate rounds its input, and the reference does not"
        return found

    def _place(self, matrix: str, part: int, judged: Judged, wrong: NDArray[np.int64]) -> str:
        i, position = (int(n[0]) for n in np.nonzero(wrong))
        share = f"{(wrong > 0).sum()} tokens"
        of_part = f", columns of rank {part}" if part else ""
        entry = self.record.inputs.get((matrix, part)) if self.record else None
        if entry is None:
            return f"{matrix}{of_part}: no codes of its input were recorded"
        return (
            f"the input of {matrix}{of_part}: {int(wrong.sum())} codes in {share} are not explained by a tie; the "
            f"first: sequence {i}, position {position}, column {judged.column[i, position]}: "
            f"{judged.theirs[i, position]}, and {judged.own[i, position]:.4f} is what the reference rounds; the "
            f"fault is there or in {before(matrix)} before it"
        )


def before(matrix: str) -> str:
    """What makes the input of a matrix."""
    prefix, _, leaf = matrix.removesuffix(".weight").rpartition(".")
    layer = int(matrix.split(".")[2])
    if leaf == "down_proj":
        return prefix + ".gate_up_proj"
    if leaf == "gate_up_proj":
        return f"model.layers.{layer}.self_attn.o_proj or model.layers.{layer}.post_attention_layernorm"
    if leaf == "o_proj":
        return f"what else {prefix} has"
    if leaf == "q_b_proj":
        return f"{prefix}.q_a_proj or {prefix}.q_a_layernorm"
    earlier = f"model.layers.{layer - 1}.mlp" if layer else "model.embed_tokens"
    return f"{earlier} or model.layers.{layer}.input_layernorm"

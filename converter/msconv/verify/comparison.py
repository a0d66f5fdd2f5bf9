"""What a comparison of logits, norms and hidden states with the reference's found."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.targets import Target

from .reference import Trace
from .scenario import Seen

ATTENTION = "post_attention_layernorm"
FLOAT32_BOUND = 1e-4  # float32 sums in another order; measured 1e-5 on random models, a fault is 1e-2 and up


@dataclass
class Comparison:
    """How far apart candidate and reference are.  A row whose two best reference logits are closer than
    twice the bound has no argmax to agree on: it is counted in `ties` and left out of `argmax_agreement`.  A row
    that is not finite, in either, does not agree.

    Rows from the first position on where a router's choice hung on rounding are left out too: `undecided`;
    `closest_routing` is the closest that was judged.  `places` counts tokens likewise, for norms.  Sequences are
    drawn so that there are few or none of them.

    `chosen`: by layer, the experts of tokens that were judged.  `looked_at`: by phase, the norms that were
    compared.

    `probes`: largest error of each norm's output, relative to its largest value; `first`: the first that is
    beyond the bound, and so the place where things go apart.  `apart`: between ranks, which must agree.

    Where each layer was given the reference's input, and not what the one before it had made, errors do not add up
    by themselves.  `own_errors`: of each such layer, the largest error of what it makes, relative to the token's
    largest value; of the last, of its logits too, as they are.  `own_deviations`: the largest length of a token's
    error, relative to the token's; their sum, which is what errors that all point the same way would add up to,
    must stay within the bound.  Both are empty elsewhere.
    """

    bound: float
    max_abs_logit_error: float = 0.0
    agreeing: int = 0
    decided: int = 0
    ties: int = 0
    worst: str = ""
    by_phase: dict[str, float] = field(default_factory=dict)
    probes: dict[str, float] = field(default_factory=dict)
    first: str = ""
    apart: float = 0.0
    largest_logit: float = 0.0
    undecided: int = 0
    places: int = 0
    places_undecided: int = 0
    layers_only: bool = False
    closest_routing: float = float("inf")
    chosen: dict[int, frozenset[int]] = field(default_factory=dict)
    looked_at: dict[str, list[str]] = field(default_factory=dict)
    own_errors: dict[str, float] = field(default_factory=dict)
    own_deviations: dict[str, float] = field(default_factory=dict)

    @property
    def deviation_sum(self) -> float:
        return sum(self.own_deviations.values())

    @property
    def rows(self) -> int:
        return self.decided + self.ties

    @property
    def argmax_agreement(self) -> float:
        return self.agreeing / self.decided if self.decided else 1.0

    @property
    def ok(self) -> bool:
        judged = self.rows > 0 or (self.layers_only and self.places > 0)
        return judged and not self._mostly_ties and self._agrees

    @property
    def ok_but_for_ties(self) -> bool:
        """Nothing that could be judged is wrong, but most could not."""
        return self._mostly_ties and self._agrees

    @property
    def _mostly_ties(self) -> bool:
        return self.undecided > self.rows or self.places_undecided > self.places

    @property
    def _agrees(self) -> bool:
        right = self.max_abs_logit_error < self.bound and self.argmax_agreement == 1.0
        return right and not self.first and self.apart < self.bound and self.deviation_sum < self.bound

    def add_step(self, step: Seen, traces: list[Trace]) -> None:
        """Compare one call: its norms, in the graph's order, then its logits."""
        judged = [p < traces[i].decided for i, p in step.places]
        self.places += sum(judged)
        self.places_undecided += len(judged) - sum(judged)
        self.layers_only = not step.logits.size
        if step.hidden is not None and step.logits.size:
            states = np.stack([traces[i].hidden[p] for i, p in step.places])
            self.add_hidden(step.phase, step.hidden, states, np.array(judged))
        self.add_norms(step.phase, step.places, step.probes, traces)
        if step.logits.size and len(step.logits) != len(step.rows):
            self.max_abs_logit_error = float("inf")
            self.worst = f"{step.phase}: {len(step.logits)} rows of logits for {len(step.rows)}"
            self.first = self.first or f"lm_head and the choice of last tokens before it, {self.worst}"
            return
        for (i, position), row in zip(step.rows, step.logits, strict=False):  # no logits: first layers only
            if position < traces[i].decided:
                self.add(step.phase, f"sequence {i}, position {position}", row, traces[i].logits[position])
            else:
                self.undecided += 1
        if not self.max_abs_logit_error < self.bound and not self.first:
            self.first = f"lm_head or what follows the last norm, seen at the logits in {step.phase}"

    def add_norms(
        self,
        phase: str,
        places: list[tuple[int, int]],
        probes: Mapping[str, NDArray[np.float32]],
        traces: list[Trace],
    ) -> None:
        """Compare norms [T, hidden] of a call's tokens, in the graph's order."""
        judged = np.array([p < traces[i].decided for i, p in places])
        self.looked_at[phase] = list(dict.fromkeys([*self.looked_at.get(phase, ()), *probes]))
        for name, found in probes.items():
            error = relative_error(found, _at(places, [t.probes[name] for t in traces]), judged)
            self.probes[name] = max(error, self.probes.get(name, 0.0))
            if error >= self.bound and not self.first:
                self.first = f"{culprit(name, self.looked_at[phase])}, seen at {name} in {phase}"

    def add_hidden(
        self, phase: str, found: NDArray[np.float32], expected: NDArray[np.float32], judged: NDArray[np.bool_]
    ) -> None:
        """Compare hidden states [T, ...] of a call, relative to the largest, where they are `judged`."""
        error = relative_error(found, expected, judged)
        key = f"hidden states {phase}"
        self.by_phase[key] = max(error, self.by_phase.get(key, 0.0))
        if not error < self.bound:
            self.fail(f"hidden states, seen in {phase}")

    def fail(self, where: str) -> None:
        """Something is wrong there that no logits row need show."""
        self.first = self.first or where

    def add(self, phase: str, where: str, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Compare one row of logits [V]."""
        error = largest_error(found, expected)
        self.by_phase[phase] = max(error, self.by_phase.get(phase, 0.0))
        if error > self.max_abs_logit_error or not self.worst:
            self.max_abs_logit_error, self.worst = max(error, self.max_abs_logit_error), f"{phase}, {where}"
        self.largest_logit = max(self.largest_logit, float(np.abs(expected).max()))
        best = np.sort(expected)[-2:]
        is_finite = bool(np.isfinite(found).all() and np.isfinite(expected).all())
        if is_finite and len(best) == 2 and best[1] - best[0] <= 2 * min(self.bound, FLOAT32_BOUND):
            self.ties += 1
            return
        self.decided += 1
        same = found.shape == expected.shape and found.argmax() == expected.argmax()
        self.agreeing += int(is_finite and same)


def _at(places: list[tuple[int, int]], values: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows of each sequence's values at (sequence, position)."""
    return np.stack([values[i][p] for i, p in places])


def half_precision_bound(target: Target, largest: float, layers: int) -> float:
    """What rounding in the target's own precision is expected to do to logits, whose largest value is `largest`.

    Each layer adds some roundings of half an ulp to the residual stream, which random walks add up."""
    return 8 * target.epsilon * largest * layers**0.5


def largest_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference; infinite if shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    error = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
    return error if np.isfinite(error) else float("inf")


def relative_error(
    found: NDArray[np.float32], expected: NDArray[np.float32], judged: NDArray[np.bool_] | None = None
) -> float:
    """`largest_error` of the rows that are `judged`, of all without it, relative to the largest value expected of
    any row, 1 at least.  Infinite, too, if what is expected is not finite."""
    largest = float(np.abs(expected).max(initial=0.0))
    if found.shape != expected.shape or not np.isfinite(largest):
        return float("inf")
    rows = slice(None) if judged is None else judged
    return largest_error(found[rows], expected[rows]) / max(1.0, largest)


def culprit(probe: str, looked_at: Collection[str] = (ATTENTION,)) -> str:
    """Which tensors stand before a norm and after the one before it.  `looked_at`: the norms that there are: none
    after attention where a layer is one node."""
    layer = re.match(r"model\.layers\.(\d+)\.(\w+)", probe)
    mlp = ".mlp" if any(name.endswith(ATTENTION) for name in looked_at) else ""
    if layer is None:
        return "the last layer's mlp" if mlp else "the last layer"
    index, kind = int(layer[1]), layer[2]
    if kind == ATTENTION:
        return f"model.layers.{index}.self_attn"
    return f"model.layers.{index - 1}{mlp}" if index else "model.embed_tokens or model.layers.0.input_layernorm"

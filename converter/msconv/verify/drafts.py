"""What is run to prove a draft that is a checkpoint of its own, and how it is judged.

The target is not needed: its embedding and its hidden states are drawn, and both sides get the same.  That the
target's own graphs give the streams that its draft expects, is proved with the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import OF_TARGET, Artifact, GraphParameter
from msconv_runtime.graphs import Graphs, Place
from msconv_runtime.roles import DRAFT_DECODE, DRAFT_EXTEND, HIDDEN, LOGITS, Role
from msconv_runtime.targets import Target
from msconv_runtime.vector_math import choose_code

from ..families import DecoderConfig
from .comparison import FLOAT32_BOUND, Comparison, relative_error
from .drafting import DraftCandidate
from .reference import Logits
from .scenario import Lengths
from .telling import Tell

TOKENS = 2048  # of the target's, at most so many are drawn: the rows of all others stay untouched
STEPS = 4  # further steps after each call with the target's states
PAGE = 16  # where the graphs leave it free
States = NDArray[np.float32]


class CheckpointReference(Protocol):
    """A draft in float32: how many tokens its target has, and the widths of its own states and of what it reads of
    its target.  `run`: a whole sequence, rows of the target's embedding [T, hidden] and T vectors of states, each
    of the target's or of its own -> logits [T, ..] and own states [T, hidden]."""

    vocab: int
    hidden: int
    streams: int

    def run(self, embedded: Any, hidden: Sequence[States]) -> tuple[Logits, States]: ...


class Drawn:
    """The model that a draft is made for, as far as it reads it: a table of random rows."""

    def __init__(self, artifact: Artifact, vocab: int, hidden: int) -> None:
        rng = np.random.default_rng(0)
        self.artifact, self.tensors = artifact, dict[str, Any]()
        self.tokens = np.sort(rng.choice(vocab, min(vocab, TOKENS), replace=False))
        self.table = np.zeros((vocab, hidden), np.float32)
        self.table[self.tokens] = rng.normal(0, 1, (len(self.tokens), hidden))

    def rows(self, rank: int, tp: int) -> NDArray[np.float32]:
        """A rank's part of the table, filled up with zeros where it does not divide."""
        count = -(-len(self.table) // tp)
        part = self.table[rank * count : (rank + 1) * count]
        return np.concatenate([part, np.zeros((count - len(part), part.shape[1]), np.float32)])

    def lend(self, wanted: GraphParameter) -> Any:
        """For graphs that run here, on one rank."""
        from msconv_runtime.binding import tensor

        return tensor(self.rows(0, 1), "float32")


@dataclass(frozen=True)
class Call:
    """Tokens of each sequence that are run together.  `counts`: of each; `streams`: whether they come with the
    target's hidden states, or with the draft's own."""

    phase: str
    role: Role
    counts: list[int]
    streams: bool


def calls_of(lengths: Lengths) -> Iterator[Call]:
    """Prompts, further steps, tokens after what is cached, further steps."""
    ones = [1] * len(lengths.prompts)
    for phase, counts in (("draft", lengths.prompts), ("draft on a cached prefix", lengths.appended)):
        yield Call(phase, DRAFT_EXTEND, counts, True)
        for _ in range(lengths.steps):
            yield Call(f"{phase}, further steps", DRAFT_DECODE, ones, False)


def prove_draft(artifact: Artifact, target: Target, config: DecoderConfig, source: Path, tell: Tell) -> Comparison:
    """Compare the artifact's graphs and bytes with its checkpoint: every row of logits and every token's own
    state, of random tokens beside random hidden states.  One rank on a CPU runs for real, in MindSpore; all others
    in the interpreter."""
    choose_code()
    built = import_module(f".{artifact.draft_kind.name}", __package__).build
    reference: CheckpointReference = built(source, artifact.manifest)
    lengths = Lengths.within(config.max_positions, STEPS, has_all_tokens=False)
    calls, rng = list(calls_of(lengths)), np.random.default_rng(0)
    drawn = Drawn(artifact, reference.vocab, reference.hidden)
    sequences = [_draw(i, calls, drawn, reference, rng) for i in range(len(lengths.prompts))]
    expected = [reference.run(drawn.table[tokens], hidden) for tokens, hidden in sequences]
    is_here = target.device.is_host and artifact.tp == 1
    candidate = (_here if is_here else _interpreted)(artifact, target, drawn)
    result = Comparison(FLOAT32_BOUND)
    _judge(result, candidate, calls, sequences, expected, tell)
    result.apart = getattr(candidate, "apart", 0.0)
    return result


def _here(artifact: Artifact, target: Target, drawn: Drawn) -> DraftCandidate:
    from msconv_runtime.session import DraftSession

    return DraftSession(Graphs(artifact, target.name, Place(page=PAGE), model=drawn))


def _interpreted(artifact: Artifact, target: Target, drawn: Drawn) -> DraftCandidate:
    import torch

    from .lockstep import Lockstep

    found = Lockstep(artifact, target.name, draft=True)
    taken = {p.name: p.shape for g in found.graphs.values() for p in g.reads if p.name.startswith(OF_TARGET)}
    for rank, files in enumerate(found.ranks):
        rows = drawn.rows(rank, artifact.tp)
        start = torch.tensor([rank * len(rows)], dtype=torch.int32)  # of the vocabulary
        for name, shape in taken.items():
            files.lend(name, torch.from_numpy(rows) if len(shape) > 1 else start)
    return found


def _draw(
    i: int, calls: list[Call], target: Drawn, reference: CheckpointReference, rng: np.random.Generator
) -> tuple[list[int], list[States]]:
    """A sequence's tokens, and the vector beside each."""
    widths = [reference.streams if c.streams else reference.hidden for c in calls for _ in range(c.counts[i])]
    tokens = [int(t) for t in rng.choice(target.tokens, len(widths))]
    return tokens, [rng.normal(0, 1, width).astype(np.float32) for width in widths]


def _judge(
    result: Comparison,
    candidate: DraftCandidate,
    calls: list[Call],
    sequences: list[tuple[list[int], list[States]]],
    expected: list[tuple[NDArray[np.float32], States]],
    tell: Tell,
) -> None:
    candidate.begin(len(sequences))
    done = [0] * len(sequences)
    for number, call in enumerate(calls):
        tell("graphs", number, len(calls))
        begins, ends = done, [d + n for d, n in zip(done, call.counts, strict=True)]
        spans = [slice(b, e) for b, e in zip(begins, ends, strict=True)]
        new = [tokens[span] for (tokens, _), span in zip(sequences, spans, strict=True)]
        hidden = np.stack([h for (_, all_), span in zip(sequences, spans, strict=True) for h in all_[span]])
        found = candidate.run(call.role, new, hidden)
        own = np.concatenate([states[span] for (_, states), span in zip(expected, spans, strict=True)])
        error = relative_error(found[HIDDEN], own)
        result.probes[HIDDEN] = max(error, result.probes.get(HIDDEN, 0.0))
        if error >= result.bound and not result.first:
            result.first = f"the draft's layer or what is before it, seen at its own states in {call.phase}"
        for i, (logits, row) in enumerate(zip((e[0] for e in expected), found[LOGITS], strict=True)):
            result.add(call.phase, f"sequence {i}, position {ends[i] - 1}", row, logits[ends[i] - 1])
        if not result.max_abs_logit_error < result.bound and not result.first:
            result.first = f"lm_head or the draft's last norm, seen at the logits in {call.phase}"
        done = ends

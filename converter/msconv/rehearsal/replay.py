"""Every call of the server once more: by the interpreter of all ranks together, on weights that it reads itself,
into caches of its own.  What the server gave must be what this gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.artifact import Artifact
from msconv_runtime.roles import ROLES
from msconv_runtime.targets import Target

from ..verify.comparison import culprit, largest_error
from .calls import batch_of, call_problems
from .protocol import HIDDEN
from .records import Call, Rank
from .served import Loaded, Served, find_loaded

Rows = NDArray[np.float32]
ULPS = 4  # of the largest logit, in half precision
ENOUGH = 50  # problems: what comes after follows from them


@dataclass(frozen=True)
class Row:
    """Logits [V] that a call gave for one sequence, whose tokens these are.  `new`: how many of the call's new
    tokens came before the last of them."""

    tokens: tuple[int, ...]
    logits: Rows
    new: int = 0


@dataclass
class Memory:
    """Caches by rank, as they must be, and which token of which position lies in each slot."""

    caches: list[list[torch.Tensor]]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]


@dataclass
class Replay:
    """`error`: largest difference of logits; `problems`: what is wrong, by call, the first one first."""

    error: float = 0.0
    num_calls: int = 0
    by_graph: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, other: Replay) -> None:
        """Count another copy's calls with these; its problems are told elsewhere."""
        self.error = max(self.error, other.error)
        self.num_calls += other.num_calls
        for role, count in other.by_graph.items():
            self.by_graph[role] = self.by_graph.get(role, 0) + count


class Replayer:
    """An artifact's graphs and weights for one target, and those of its draft, read anew."""

    def __init__(
        self, artifact: Artifact, target: Target, exact: bool, bound: float, draft: Artifact | None = None
    ) -> None:
        """`bound`: of exact logits; in half precision the same kernels ran, and may differ by some ulp."""
        self.exact, self.bound = exact, bound
        self.models = [Served(artifact, target, exact)]
        if draft is not None:
            self.models.append(Served(draft, target, exact, self.models[0]))

    def loaded(self, ranks: list[Rank]) -> Loaded:
        """Whose graphs the ranks loaded, those of nobody left out."""
        return {place: found for rank in ranks for place, found in find_loaded(rank, self.models).items()}

    def run(
        self,
        ranks: list[Rank],
        page: int,
        on_rows: Callable[[str, list[Row]], None] = lambda where, rows: None,
        whole: bool = True,
        enough: int = ENOUGH,
    ) -> Replay:
        """All calls of one copy of the model, until there are `enough` problems.  `on_rows` gets which call it
        was, and rank 0's logits.  `whole`: all ranks must have made the same calls."""
        found = Replay()
        known = self.loaded(ranks)
        memories: dict[int, Memory] = {}
        for calls in zip(*(r.calls() for r in ranks), strict=False):
            found.num_calls += 1
            first = calls[0]
            whose = [known.get((r.rank, c.loaded)) for r, c in zip(ranks, calls, strict=True)]
            names = {of[0].name(of[1]) if of else None for of in whose}
            name = next(iter(names))
            where = f"call {first.number} ({name or 'unknown graph'}{', warm-up' * first.is_warm_up})"
            if whose[0] is None or name is None or len(names) > 1:
                found.problems.append(f"{where}: ranks ran {sorted(map(str, names))}")
                return found
            model, role = whose[0]
            found.by_graph[name] = found.by_graph.get(name, 0) + 1
            problems = list(_unlike(calls))
            for rank, call in zip(ranks, calls, strict=True):
                slots = call.caches[0].shape[1] if call.is_warm_up else page
                found_here = call_problems(call, model.graphs[role], slots)
                problems += [f"rank {rank.rank}: {p}" if len(ranks) > 1 else p for p in found_here]
            if first.caches[0].at not in memories:
                memories[first.caches[0].at] = _blank(first, model)
            memory = memories[first.caches[0].at]
            rows: list[Row] = []
            failed = [c.error for c in calls if c.error]
            problems += [f"the graph cannot be run: {error}" for error in failed[:1]]
            if not failed and _can_run(first, memory):
                problems += self._compare(calls, model, role, memory, found)
                rows = _rows(first, role, memory, problems)
            elif not problems:
                problems.append("the call cannot be replayed: its inputs do not fit the caches")
            found.problems += [f"{where}: {p}" for p in problems]
            on_rows(where, [] if model.is_draft else rows)
            if len(found.problems) > enough:
                return found
        counts = {r.num_calls for r in ranks}
        if len(counts) > 1 and whole:
            found.problems.append(f"ranks made different numbers of calls: {sorted(counts)}")
        return found

    def _bound(self, expected: Rows) -> float:
        if self.exact:
            return self.bound
        eps = float(torch.finfo(self.models[0].dtype).eps)
        return ULPS * eps * max(1.0, float(np.abs(expected).max(initial=0.0)))

    def _compare(
        self, calls: tuple[Call, ...], model: Served, role: str, memory: Memory, found: Replay
    ) -> Iterator[str]:
        """Run the call again; where logits differ, the first norm that does is named."""
        first = calls[0]
        given = [t.to(model.keep) if n in ("attention_mask", HIDDEN) else t for n, t in first.inputs.items()]
        step = model.interpreter.run(model.programs[role], [[*given, *caches] for caches in memory.caches])
        batch = batch_of(first)
        memory.tokens[batch.slots], memory.positions[batch.slots] = batch.input_ids, batch.positions
        logits = [outputs[0] for outputs in step.outputs]
        for rank, (call, expected) in enumerate(zip(calls, logits, strict=True)):
            error, bound = largest_error(call.logits.numpy(), expected), self._bound(expected)
            found.error = max(found.error, error)
            if not error < bound:
                place = next(
                    (
                        f"; first in {culprit(name)}, seen at {name}"
                        for name, values in step.probes.items()
                        if name in call.probes and not largest_error(call.probes[name].numpy(), values) < bound
                    ),
                    "",
                )
                yield (
                    f"logits of rank {rank} differ from the interpreter's by {error:.2e} (bound {bound:.0e})"
                    f"{place}"
                )
        for rank, (call, outputs) in enumerate(zip(calls, step.outputs, strict=True)):
            if call.states is not None:
                error, bound = largest_error(call.states.numpy(), outputs[1]), self._bound(outputs[1])
                if not error < bound:
                    yield f"hidden states of rank {rank} differ from the interpreter's by {error:.2e}"


def _blank(call: Call, model: Served) -> Memory:
    caches = [[torch.zeros(c.shape, dtype=model.keep) for c in call.caches] for _ in model.files]
    slots = call.caches[0].shape[0] * call.caches[0].shape[1]
    return Memory(caches, np.full(slots, -1), np.full(slots, -1))


def _unlike(calls: tuple[Call, ...]) -> Iterator[str]:
    """Inputs in which ranks differ."""
    for rank, call in enumerate(calls[1:], 1):
        for name, values in call.inputs.items():
            if not torch.equal(values, calls[0].inputs[name]):
                yield f"{name}: differs between rank 0 and rank {rank}"


def _can_run(call: Call, memory: Memory) -> bool:
    """Whether the interpreter can take these inputs: slots and the pages that sequences have are in the caches."""
    slots, tables = call.inputs["slots"], call.inputs["block_tables"]
    pages, page = call.caches[0].shape[:2]
    if tuple(memory.caches[0][0].shape) != call.caches[0].shape or not slots.numel():
        return False
    used = [t[: -(-int(n) // page)] for t, n in zip(tables, call.inputs["context_lens"], strict=False)]
    inside = all(not u.numel() or 0 <= int(u.min()) <= int(u.max()) < pages for u in used)
    return inside and 0 <= int(slots.min()) <= int(slots.max()) < len(memory.tokens)


def _rows(call: Call, role: str, memory: Memory, problems: list[str]) -> list[Row]:
    """The logits of each sequence's last token, or of all its new ones, with the tokens that its pages hold.  A
    page that holds something else than its positions is a problem."""
    batch, page = batch_of(call), call.caches[0].shape[1]
    rows = []
    for i, context in enumerate(batch.context_lens):
        positions = np.arange(context)
        if not len(positions) or positions[-1] // page >= batch.block_tables.shape[1]:
            continue
        slots = batch.block_tables[i, positions // page] * page + positions % page
        if (memory.positions[slots] != positions).any():
            wrong = int(positions[memory.positions[slots] != positions][0])
            problems.append(
                f"block_tables: position {wrong} of sequence {i} lies in slot {slots[wrong]}, which holds "
                f"position {memory.positions[slots[wrong]]}"
            )
            continue
        tokens = tuple(memory.tokens[slots].tolist())
        if ROLES[role].rows != "all":
            rows.append(Row(tokens, call.logits[i].numpy()))
            continue
        new, end = int(batch.q_lens[i]), int(batch.q_lens[: i + 1].sum())
        rows += [Row(tokens[: context - new + n + 1], call.logits[end - new + n].numpy(), n) for n in range(new)]
    return rows

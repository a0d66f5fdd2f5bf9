"""One layer of all ranks, given the reference's input, in all calls of a scenario one after another: its keys and
values of earlier calls are its own.

A job is a value: any machine that sees the artifact and the given values can do layers of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import ResourceError, UsageError
from msconv_runtime.roles import ROLES

from ...mindir.interpreter import Execution
from ...stream.movers.node import Doing, Job
from ...stream.task import Unit
from ..comparison import Comparison, culprit
from ..layers import add_piece
from ..lockstep import Lockstep
from ..reference import Trace
from ..scenario import Call
from ..together import piece
from .given import NORM, STREAM, Given, first_norm
from .segments import Carried, Segment, keep_caches_apart, segments_of

TOKENS = "input_ids"


@dataclass(frozen=True)
class ProveLayers(Job):
    """Layers of these graphs, in these calls.  A unit is a layer's number.  `digests`: of weights and graphs that
    the driver has checked."""

    root: Path
    target: str
    variant: str
    held_bytes: int
    bound: float
    calls: tuple[Call, ...]
    given: Given
    digests: tuple[str, ...]

    def open(self, jobs: int) -> Doing:
        artifact = Artifact(self.root)
        if digests_of(artifact, self.target) != self.digests:
            raise ResourceError(f"{self.root}: another artifact is there than on the machine that asks.")
        one = Lockstep(artifact, self.target, variant=self.variant, held_bytes=self.held_bytes)
        return Layers(one, self)


@dataclass(frozen=True)
class Own:
    """A layer's own error and deviation, see Comparison."""

    error: float = 0.0
    deviation: float = 0.0

    def beside(self, other: Own) -> Own:
        """The larger of each."""
        return Own(max(self.error, other.error), max(self.deviation, other.deviation))


class Layers(Doing):
    """Layers of one candidate."""

    def __init__(self, one: Lockstep, job: ProveLayers) -> None:
        self.one, self.job = one, job
        self.calls = [
            replace(call, role=ROLES[call.role.name]) for call in job.calls
        ]  # roles are told by identity
        self.segments = cut(one)

    def work(self, units: Sequence[Unit]) -> tuple[dict[str, Any], ...]:
        """Of each layer, a Comparison as data, with that layer's own error."""
        return tuple(asdict(self.prove(int(number))) for (number,) in units)

    def prove(self, layer: int) -> Comparison:
        one, traces, result = self.one, self.job.given.traces(layer), Comparison(self.job.bound)
        given = _Values(self.job.given)
        executions, names = one.executions(self.calls)
        own = Own()
        for number, (call, execution) in enumerate(zip(self.calls, executions, strict=True)):
            segment = self.segments[id(execution.program)][layer]
            rows = self.job.given.rows(call.places)
            execution.begin_at(segment.begin, segment.before, {c.name: given.of(c, rows) for c in segment.taken})
            probes = execution.advance(segment.end)
            is_last = layer == self.job.given.layers - 1
            add_piece(result, call, piece(number, execution, probes, names[number], is_last), traces)
            own = own.beside(self._own(result, call, execution, segment, probes, traces, given))
            result.apart = max(result.apart, execution.apart)
            executions[number].values.clear()
            one.release(executions)
        result.own_errors[f"model.layers.{layer}"] = max(own.error, result.max_abs_logit_error)
        result.own_deviations[f"model.layers.{layer}"] = own.deviation
        return result

    def _own(
        self,
        result: Comparison,
        call: Call,
        execution: Execution,
        segment: Segment,
        probes: dict[str, NDArray[np.float32]],
        traces: list[Trace],
        given: _Values,
    ) -> Own:
        """Of a call's norms, and of all that is left to later layers, on every rank."""
        judged = np.array([p < traces[i].decided for i, p in call.places])
        own = Own()
        for name, found in probes.items():
            expected = np.stack([traces[i].probes[name][p] for i, p in call.places])
            own = own.beside(by_token(found, expected, judged))
        rows = self.job.given.rows(call.places)
        for carried in segment.left:
            wanted = given.of(carried, rows)
            left = Own()
            for env in execution.values:
                left = left.beside(_left(env.get(carried.name), wanted, carried, judged))
            if not left.error < result.bound:
                norm = first_norm(carried.border)
                result.fail(f"{culprit(norm)}, seen at the residual stream that enters {norm} in {call.phase}")
            own = own.beside(left)
        return own


class _Values:
    """The reference's values at borders, each read once."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._borders: dict[int, dict[str, torch.Tensor]] = {}

    def of(self, carried: Carried, rows: torch.Tensor) -> Any:
        """What a value is for these tokens: [T, hidden], or a tuple with that in the items that are read."""
        if carried.border not in self._borders:
            self._borders[carried.border] = self._given.border(carried.border)
        values = self._borders[carried.border]
        if not carried.items:
            return values[NORM if carried.is_norm else STREAM][rows]
        return tuple(
            values[NORM if carried.is_norm and not i else STREAM][rows] if i in carried.items else None
            for i in range(max(carried.items) + 1)
        )


def _left(found: Any, expected: Any, carried: Carried, judged: NDArray[np.bool_]) -> Own:
    """How far a value is from what later layers are given in its place."""
    own = Own()
    for f, e in [(found[i], expected[i]) for i in carried.items] if carried.items else [(found, expected)]:
        own = own.beside(by_token(f.float().numpy(), e.numpy(), judged))
    return own


def by_token(found: NDArray[np.float32], expected: NDArray[np.float32], judged: NDArray[np.bool_]) -> Own:
    """The largest error of rows [T, hidden] that are judged, and the largest length of one, relative to the same
    of what is expected.  Infinite if shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return Own(float("inf"), float("inf"))
    error = found.astype(np.float64) - expected
    largest = np.abs(error).max(-1, initial=0.0) / np.maximum(1.0, np.abs(expected).max(-1, initial=0.0))
    length = np.linalg.norm(error, axis=-1) / np.maximum(1.0, np.linalg.norm(expected, axis=-1))
    worst = [float(of[judged].max(initial=0.0)) for of in (largest, length)]
    return Own(*(n if np.isfinite(n) else float("inf") for n in worst))


def digests_of(artifact: Artifact, target: str) -> tuple[str, ...]:
    return artifact.weights.digest, *sorted(g.digest for g in artifact.graphs(target))


def cut(one: Lockstep) -> dict[int, list[Segment]]:
    """Segments of each program, by its id.  Raises UsageError where a layer cannot be run by itself."""
    found, places = {}, set()
    for role, program in one.programs.items():
        graph = one.graphs[role]
        caches = program.inputs[len(program.inputs) - len(graph.caches) :]
        tokens = program.inputs[[i.name for i in graph.inputs].index(TOKENS)]
        segments = segments_of(program, one.num_layers, tokens, caches)
        touched = keep_caches_apart(program, segments, caches) if segments else None
        if segments is None or touched is None:
            raise UsageError(
                f"{graph.path}: its layers share more than the residual stream: they cannot be proved each by "
                "itself.",
                "Verify without --ray: that finds where.",
            )
        found[id(program)] = segments
        places.add(tuple(touched))
    if len(places) > 1:
        raise UsageError(
            "The graphs' layers use other caches in one graph than in the next: they cannot be proved each by "
            "itself.",
            "Verify without --ray: that finds where.",
        )
    return found

"""The machine that asks: it gives workers what the reference has between layers, and gathers what they found.

What a worker found is kept when it is there: a run that was ended goes on with the layers that are left.
"""

from __future__ import annotations

import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msconv_runtime.artifact import STATE_DIR, Artifact

from ...stream.movers.workers import Batch, Cluster, Crew, Handing, Words
from ...stream.source import FileState
from ...workspace.disk import disk_error
from ...workspace.lock import exclusive
from ..comparison import Comparison
from ..kept import Kept
from ..layers import InLayers
from ..lockstep import Lockstep
from ..reference import Trace
from ..scenario import Call
from .given import Given, write
from .prover import ProveLayers, digests_of

WORK = "proof-"
WORDS = Words(
    "proof",
    "proved",
    "files of the artifact",
    "Put the artifact on storage that every node mounts at the same path, and install this msconv, with what it "
    'needs to verify (pip install "msconv[verify,ray]"), on every node; or take the node out of the cluster.',
    "what was found is kept, if the model has more than 2 GiB",
    "--max-memory",
    "{} threads",
)


@dataclass
class ByLayer:
    """Workers of a cluster, for the proofs of one artifact."""

    crew: Crew

    @classmethod
    def of(cls, cluster: Cluster, jobs: int, tell: Callable[[str], None]) -> ByLayer:
        return cls(Crew(cluster, jobs, tell, WORDS))

    def gather(self, artifact: Artifact, target: str) -> None:
        """Start workers on all nodes that see the artifact.  Raises EnvironmentProblem or ResourceError."""
        paths = [f.path for f in artifact.weights.files] + [g.path for g in artifact.graphs(target)]
        with exclusive(artifact.root):
            self.crew.gather(artifact.root, tuple(_state(artifact.root / p) for p in sorted(set(paths))))

    def end(self) -> None:
        """End all workers."""
        self.crew.end()


@dataclass
class JudgeByLayer:
    """Judges a candidate by its layers (`layers.JudgeInLayers`)."""

    by_layer: ByLayer
    artifact: Artifact
    target: str
    held_bytes: int

    def __call__(
        self,
        result: Comparison,
        one: InLayers,
        calls: list[Call],
        traces: list[Trace],
        kept: Kept,
        name: str,
        tell: Callable[[int, int], None],
    ) -> None:
        """Add to `result` what all layers gave, in their order."""
        assert isinstance(one, Lockstep)
        layers = one.num_layers
        done: dict[int, dict[str, Any]] = {}
        for number in range(layers):
            if (known := kept.load(f"{name} layer {number}")) is not None:
                done[number] = known[1]
        tell(len(done), layers)
        if left := [n for n in range(layers) if n not in done]:
            with exclusive(self.artifact.root), _work(self.artifact.root) as work:
                job = self._job(one.variant, result.bound, calls, _written(work, traces, layers))
                for number, found in self._handed(job, left):
                    kept.save(f"{name} layer {number}", {}, found)
                    done[number] = found
                    tell(len(done), layers)
        for number in range(layers):
            merge(result, done[number])

    def _job(self, variant: str, bound: float, calls: Sequence[Call], given: Given) -> ProveLayers:
        root, digests = self.artifact.root.absolute(), digests_of(self.artifact, self.target)
        return ProveLayers(root, self.target, variant, self.held_bytes, bound, tuple(calls), given, digests)

    def _handed(self, job: ProveLayers, layers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        todo = deque(Batch([(str(n),)]) for n in layers)
        for done in Handing(self.by_layer.crew, job, todo):
            for (number,), found in zip(done.batch.units, done.results, strict=True):
                yield int(number), found


def merge(result: Comparison, part: dict[str, Any]) -> None:
    """Add what one layer gave."""
    found = Comparison(**part)
    if found.max_abs_logit_error > result.max_abs_logit_error or not result.worst:
        result.worst = found.worst or result.worst
    for name in ("max_abs_logit_error", "apart", "largest_logit"):
        setattr(result, name, max(getattr(result, name), getattr(found, name)))
    for name in ("agreeing", "decided", "ties", "undecided", "places", "places_undecided"):
        setattr(result, name, getattr(result, name) + getattr(found, name))
    for name in ("by_phase", "probes", "own_errors", "own_deviations"):
        known = getattr(result, name)
        for key, error in getattr(found, name).items():
            known[key] = max(error, known.get(key, 0.0))
    result.first = result.first or found.first


def _state(path: Path) -> FileState:
    status = path.stat()
    return FileState(str(path.absolute()), status.st_size, status.st_mtime_ns)


def _written(work: Path, traces: Sequence[Trace], layers: int) -> Given:
    try:
        return write(work, traces, layers)
    except OSError as e:
        raise disk_error(e, work, 0) from None


@contextmanager
def _work(root: Path) -> Iterator[Path]:
    """A directory for what workers read, gone afterwards; and those that killed runs have left."""
    state = root.absolute() / STATE_DIR
    for old in state.glob(f"{WORK}*"):
        shutil.rmtree(old, ignore_errors=True)
    work = state / f"{WORK}{secrets.token_hex(8)}"
    try:
        work.mkdir()
    except OSError as e:
        raise disk_error(e, root, 0) from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)

"""Nodes of a cluster: batches of units go to whoever is free, one worker a node, and again to another if a worker
is lost.  What a cluster is made of stands elsewhere: here it starts workers on nodes.

The driver alone has the lock, the journal and READY.  A worker that goes on after its driver is gone does no harm:
it writes the bytes that the next run writes there too, or into files that have been unlinked.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from msconv_runtime.artifact import STATE_DIR
from msconv_runtime.errors import EnvironmentProblem, MsconvError, ResourceError

from ...layout.plan import Plan
from ...workspace.disk import disk_error
from ...workspace.names import TOOL
from ..source import FileState, Progress
from ..task import Opened, Task, Unit
from ..transform import Moved
from . import Mover, Moving
from .node import Answer, Look, Seen
from .readback import check_written

BATCH_BYTES = 256 << 20  # read for one answer: what a lost worker does again
BATCHES_A_NODE = 4  # at least, so that no node waits long for the last
TRIES = 3  # of one batch, and of one node without an answer
STARTS_WITHIN_S = 60.0  # a worker, on a node that may be busy
JOINS_WITHIN_S = 20.0  # while others work
LOOKS_EVERY_S = 10.0  # for nodes that have joined
ENDS_WITHIN_S = 10.0


class WorkerLost(Exception):
    """A worker ended, or its node did."""


class Worker(Protocol):
    """A NodeWorker somewhere.  Each of its answers may be WorkerLost."""

    def look(self, look: Look) -> Future[Seen]: ...

    def begin(self, task: Task) -> Future[None]: ...

    def move(self, units: Sequence[Unit]) -> Future[Answer]: ...

    def end(self) -> None:
        """End it at once, whatever it does."""


class Cluster(Protocol):
    """Machines that workers can be started on."""

    def nodes(self) -> dict[str, str]:
        """Those that are there now: by what tells them apart, what people call them."""

    def start(self, node: str, jobs: int) -> Worker:
        """A worker of so many threads on this node.  It may come up later, or never."""


@dataclass
class Batch:
    """Units that are answered for together.  `lost`: how often their worker was."""

    units: list[Unit]
    nbytes: int = 0
    lost: int = 0


@dataclass
class Nodes(Mover):
    """All nodes of a cluster that see this machine's storage.  `tell`: who hears what people should know."""

    cluster: Cluster
    jobs: int
    tell: Callable[[str], None]
    _workers: dict[str, Worker] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _files: tuple[FileState, ...] = ()  # of the source: all workers have seen them

    def check(self, task: Task) -> None:
        self._files = task.source.states()
        self._refuse(self._join(task.outputs.root, self._files, self.cluster.nodes(), STARTS_WITHIN_S))
        if not self._workers:
            raise EnvironmentProblem(
                "No node of the cluster started a worker.",
                "`ray status` says what its processors are taken by.",
            )
        names = sorted(self._names[n] for n in self._workers)
        self.tell(
            f"Nodes at work: {len(names)}, --jobs {self.jobs} each: "
            + ", ".join(names[:8])
            + ", ..." * (len(names) > 8)
        )

    def start(self, task: Task, units: Sequence[Unit], opened: Opened, progress: Progress) -> Moving:
        opened.outputs.sync()  # headers and constants: this machine writes no more
        outputs = replace(task.outputs, root=task.outputs.root.absolute())
        task = replace(task, source=opened.source.elsewhere(), outputs=outputs)
        if task.source.states() != self._files:  # they were downloaded only now
            self._files, workers = task.source.states(), dict(self._workers)
            with _token(outputs.root) as (path, text):
                self._refuse(self._look(workers, Look(path, self._files), text, STARTS_WITHIN_S))
        return _Batches(self, task, batches(task.plan, units, len(self._workers)), progress)

    def end(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()

    def _refuse(self, problems: list[str]) -> None:
        """Raises ResourceError if there are any."""
        if problems:
            self.end()
            raise ResourceError(
                "\n".join([f"{len(problems)} of {len(self._names)} nodes cannot do this conversion:", *problems]),
                "Give --output and the checkpoint on storage that every node mounts at the same path, and install "
                "this msconv on every node; or take the node out of the cluster.",
            )

    def _join(self, root: Path, files: tuple[FileState, ...], nodes: dict[str, str], within_s: float) -> list[str]:
        """Start a worker on each of these nodes, and keep those that see what this machine sees.  Returns what is
        wrong with others; one that did not come up in time is told of."""
        self._names |= nodes
        with _token(root.absolute()) as (path, text):
            started = {node: self.cluster.start(node, self.jobs) for node in nodes}
            try:
                return self._look(started, Look(path, files), text, within_s)
            finally:
                for node, worker in started.items():
                    if self._workers.get(node) is not worker:
                        worker.end()

    def _look(self, started: dict[str, Worker], look: Look, text: str, within_s: float) -> list[str]:
        """Keep those of the workers that see what this machine sees."""
        problems = []
        looking = {worker.look(look): node for node, worker in started.items()}
        seen, late = wait(looking, within_s)
        for answer in seen:
            node = looking[answer]
            problem = _problem(answer, text)
            if problem:
                problems.append(f"  {self._names[node]}: {problem}")
            else:
                self._workers[node] = started[node]
        for answer in late:
            self.tell(f"{self._names[looking[answer]]}: started no worker within {within_s:.0f} s.")
        return sorted(problems)


def batches(plan: Plan, units: Sequence[Unit], nodes: int) -> deque[Batch]:
    """Units one after another, in the order of the source's files, so that each worker reads in order."""
    total = sum(plan.unit_bytes(u) for u in units)
    most = min(BATCH_BYTES, total // (BATCHES_A_NODE * max(1, nodes)))
    made: deque[Batch] = deque()
    for unit in units:
        nbytes = plan.unit_bytes(unit)
        if not made or made[-1].nbytes + nbytes > most:
            made.append(Batch([]))
        made[-1].units.append(unit)
        made[-1].nbytes += nbytes
    return made


@contextmanager
def _token(root: Path) -> Iterator[tuple[Path, str]]:
    """A file with a text that only who sees this directory can know."""
    text = secrets.token_hex(16)
    path = root / STATE_DIR / f"shared-{text[:8]}"
    try:
        with path.open("x") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise disk_error(e, root, 0) from None
    try:
        yield path, text
    finally:
        path.unlink(missing_ok=True)


def _problem(answer: Future[Seen], text: str) -> str:
    """What is wrong with what a node saw, or nothing."""
    try:
        seen = answer.result()
    except WorkerLost as e:
        return f"no worker starts there: {e}"
    if seen.tool != TOOL:
        return f"has {seen.tool}, this is {TOOL}"
    if seen.token != text:
        reason = seen.token if len(seen.token) != len(text) else "another file is there"
        return f"its storage is not this machine's: of the output directory, {reason}"
    if seen.different:
        return "sees other source files: " + "; ".join(seen.different[:3])
    return ""


class _Batches(Moving):
    def __init__(self, mover: Nodes, task: Task, todo: deque[Batch], progress: Progress) -> None:
        self._mover, self._task, self._todo, self._progress = mover, task, todo, progress
        self._begun: dict[str, tuple[Worker, Future[None]]] = {}
        self._running: dict[Future[Answer], tuple[str, Batch]] = {}
        self._failed: dict[str, int] = {}  # by node: workers lost one after another
        self._looked = time.monotonic()

    def __iter__(self) -> Iterator[list[Moved]]:
        while self._todo or self._running:
            self._give()
            done, _ = wait(self._running, LOOKS_EVERY_S, FIRST_COMPLETED)
            ended = [(answer, *self._running.pop(answer)) for answer in done]
            whole = [found for found in ended if self._is_whole(*found)]
            self._give()  # nobody waits for what is read back
            for answer, node, batch in whole:
                yield self._moved(answer.result(), node, batch)

    def sync(self) -> None:
        """Workers have done so before they answered."""

    def stop(self) -> None:
        self._mover.end()
        wait(self._running, ENDS_WITHIN_S)
        self._running.clear()

    def _give(self) -> None:
        """Each worker that is free gets a batch."""
        self._renew()
        busy = {node for node, _ in self._running.values()}
        for node, worker in list(self._mover._workers.items()):
            if node in busy or not self._todo:
                continue
            if node not in self._begun or self._begun[node][0] is not worker:
                self._begun[node] = worker, worker.begin(self._task)  # if it fails, so does the next
            batch = self._todo.popleft()
            self._running[worker.move(batch.units)] = node, batch
        if self._todo and not self._running:
            raise ResourceError(
                "No worker is left: every node of the cluster was lost, or lost its workers again and again.",
                "Run the same command again, with or without --ray: it resumes.",
            )

    def _renew(self) -> None:
        """A worker for each node that has none: those that joined, and those whose worker was lost."""
        mover = self._mover
        if not self._todo or (mover._workers and time.monotonic() - self._looked < LOOKS_EVERY_S):
            return
        self._looked = time.monotonic()
        found = mover.cluster.nodes()
        new = {n: name for n, name in found.items() if n not in mover._workers and self._failed.get(n, 0) < TRIES}
        if not new:
            return
        within_s = JOINS_WITHIN_S if mover._workers else STARTS_WITHIN_S
        for problem in mover._join(self._task.outputs.root, mover._files, new, within_s):
            mover.tell(f"Left out:{problem}")
        for node, name in new.items():
            if node in mover._workers:
                mover.tell(f"{name}: has a new worker.")
            else:
                self._failed[node] = self._failed.get(node, 0) + 1

    def _is_whole(self, answer: Future[Answer], node: str, batch: Batch) -> bool:
        """Whether a batch was answered for; else it goes to the next worker.  Raises when that is no use."""
        try:
            answer.result()
        except WorkerLost as e:
            worker, begun = self._begun.pop(node)
            reason, name = (begun.done() and begun.exception()) or e, self._mover._names[node]
            self._mover._workers.pop(node, None)
            worker.end()
            batch.lost += 1
            self._failed[node] = self._failed.get(node, 0) + 1
            if batch.lost >= TRIES:
                raise ResourceError(
                    f"{batch.units[0][0]}: {TRIES} workers ended while they moved it and {len(batch.units) - 1} "
                    f"more, the last on {name}: {reason}",
                    "Look there for what ended them, most often too little memory (--jobs 1, --max-memory); then "
                    "run the same command again: it resumes.",
                ) from None
            self._mover.tell(f"{name}: its worker was lost ({reason}); what it did is done again.")
            self._todo.appendleft(batch)
            self._looked = time.monotonic()  # a node that is gone is not listed any more the next time
            return False
        self._failed.pop(node, None)
        return True

    def _moved(self, answer: Answer, node: str, batch: Batch) -> list[Moved]:
        """What was moved, read back.  Raises the worker's error."""
        name = self._mover._names[node]
        if answer.error is not None:
            raise _on(answer.error, name)
        check_written(self._task.outputs, self._task.plan, answer.moved, name)
        self._progress(batch.nbytes)
        return list(answer.moved)


def _on(error: MsconvError, node: str) -> MsconvError:
    """The same error, with the node's name."""
    return type(error)(f"On {node}: {error.message}", error.hint)

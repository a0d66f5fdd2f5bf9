"""Workers on the nodes of a cluster, one each: batches go to whoever is free, and again to another if a worker is
lost.  Knows neither what a cluster is made of nor what the work is.

A node takes part if it reads what this machine has just written, and sees the same files.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from msconv_runtime.artifact import STATE_DIR
from msconv_runtime.errors import EnvironmentProblem, MsconvError, ResourceError

from ...workspace.disk import disk_error
from ...workspace.names import TOOL
from ..source import FileState
from ..task import Unit
from .node import Answer, Job, Look, Seen

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

    def begin(self, job: Job) -> Future[None]: ...

    def work(self, units: Sequence[Unit]) -> Future[Answer]: ...

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


@dataclass(frozen=True)
class Words:
    """What messages call the work, what is done with a unit, what a node must see, and what helps.  `limits`: the
    options that make a worker smaller; `threads`: what a worker's are, with their number in {}."""

    work: str
    done: str
    files: str
    storage: str
    again: str
    limits: str
    threads: str


@dataclass
class Crew:
    """Workers on all nodes that see this machine's storage.  `tell`: who hears what people should know."""

    cluster: Cluster
    jobs: int
    tell: Callable[[str], None]
    words: Words
    workers: dict[str, Worker] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    root: Path = Path()
    files: tuple[FileState, ...] = ()  # that all workers have seen

    def gather(self, root: Path, files: tuple[FileState, ...]) -> None:
        """Start a worker on each node, and have it look at files and at the directory `root`.  Raises
        EnvironmentProblem or ResourceError."""
        self.root, self.files = root.absolute(), files
        self._refuse(self.join(self.cluster.nodes(), STARTS_WITHIN_S))
        if not self.workers:
            raise EnvironmentProblem(
                "No node of the cluster started a worker.",
                "`ray status` says what its processors are taken by.",
            )
        names = sorted(self.names[n] for n in self.workers)
        self.tell(
            f"Nodes at work: {len(names)}, {self.words.threads.format(self.jobs)} each: "
            + ", ".join(names[:8])
            + ", ..." * (len(names) > 8)
        )

    def look_again(self, files: tuple[FileState, ...]) -> None:
        """Have all workers look at other files.  Raises ResourceError."""
        self.files = files
        with _token(self.root) as (path, text):
            self._refuse(self._look(dict(self.workers), Look(path, files), text, STARTS_WITHIN_S))

    def join(self, nodes: dict[str, str], within_s: float) -> list[str]:
        """Start a worker on each of these nodes, and keep those that see what this machine sees.  Returns what is
        wrong with others; one that did not come up in time is told of."""
        self.names |= nodes
        with _token(self.root) as (path, text):
            started = {node: self.cluster.start(node, self.jobs) for node in nodes}
            try:
                return self._look(started, Look(path, self.files), text, within_s)
            finally:
                for node, worker in started.items():
                    if self.workers.get(node) is not worker:
                        worker.end()

    def end(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()

    def _refuse(self, problems: list[str]) -> None:
        """Raises ResourceError if there are any."""
        if problems:
            self.end()
            raise ResourceError(
                "\n".join(
                    [f"{len(problems)} of {len(self.names)} nodes cannot do this {self.words.work}:", *problems]
                ),
                self.words.storage,
            )

    def _look(self, started: dict[str, Worker], look: Look, text: str, within_s: float) -> list[str]:
        """Keep those of the workers that see what this machine sees."""
        problems = []
        looking = {worker.look(look): node for node, worker in started.items()}
        seen, late = wait(looking, within_s)
        for answer in seen:
            node = looking[answer]
            problem = self._problem(answer, text)
            if problem:
                problems.append(f"  {self.names[node]}: {problem}")
            else:
                self.workers[node] = started[node]
        for answer in late:
            self.tell(f"{self.names[looking[answer]]}: started no worker within {within_s:.0f} s.")
        return sorted(problems)

    def _problem(self, answer: Future[Seen], text: str) -> str:
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
            return f"sees other {self.words.files}: " + "; ".join(seen.different[:3])
        return ""


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


@dataclass(frozen=True)
class Done:
    """What a worker answered for a batch, and what people call its node."""

    results: tuple[Any, ...]
    node: str
    batch: Batch


class Handing:
    """Batches on their way through a crew, which does `job`."""

    def __init__(self, crew: Crew, job: Job, todo: deque[Batch]) -> None:
        self._crew, self._job, self._todo = crew, job, todo
        self._begun: dict[str, tuple[Worker, Future[None]]] = {}
        self._running: dict[Future[Answer], tuple[str, Batch]] = {}
        self._failed: dict[str, int] = {}  # by node: workers lost one after another
        self._looked = time.monotonic()

    def __iter__(self) -> Iterator[Done]:
        """Answers, in any order.  Raises the first error of a worker, or ResourceError if none is left."""
        while self._todo or self._running:
            self._give()
            done, _ = wait(self._running, LOOKS_EVERY_S, FIRST_COMPLETED)
            ended = [(answer, *self._running.pop(answer)) for answer in done]
            whole = [found for found in ended if self._is_whole(*found)]
            self._give()  # nobody waits for what is done with an answer
            for answer, node, batch in whole:
                found, name = answer.result(), self._crew.names[node]
                if found.error is not None:
                    raise _on(found.error, name)
                yield Done(found.results, name, batch)

    def stop(self) -> None:
        """End the workers, and return when none works any more."""
        self._crew.end()
        wait(self._running, ENDS_WITHIN_S)
        self._running.clear()

    def _give(self) -> None:
        """Each worker that is free gets a batch."""
        self._renew()
        busy = {node for node, _ in self._running.values()}
        for node, worker in list(self._crew.workers.items()):
            if node in busy or not self._todo:
                continue
            if node not in self._begun or self._begun[node][0] is not worker:
                self._begun[node] = worker, worker.begin(self._job)  # if it fails, so does the next
            batch = self._todo.popleft()
            self._running[worker.work(batch.units)] = node, batch
        if self._todo and not self._running:
            raise ResourceError(
                "No worker is left: every node of the cluster was lost, or lost its workers again and again.",
                f"Run the same command again, with or without --ray: {self._crew.words.again}.",
            )

    def _renew(self) -> None:
        """A worker for each node that has none: those that joined, and those whose worker was lost."""
        crew = self._crew
        if not self._todo or (crew.workers and time.monotonic() - self._looked < LOOKS_EVERY_S):
            return
        self._looked = time.monotonic()
        found = crew.cluster.nodes()
        new = {n: name for n, name in found.items() if n not in crew.workers and self._failed.get(n, 0) < TRIES}
        if not new:
            return
        for problem in crew.join(new, JOINS_WITHIN_S if crew.workers else STARTS_WITHIN_S):
            crew.tell(f"Left out:{problem}")
        for node, name in new.items():
            if node in crew.workers:
                crew.tell(f"{name}: has a new worker.")
            else:
                self._failed[node] = self._failed.get(node, 0) + 1

    def _is_whole(self, answer: Future[Answer], node: str, batch: Batch) -> bool:
        """Whether a batch was answered for; else it goes to the next worker.  Raises when that is no use."""
        try:
            answer.result()
        except WorkerLost as e:
            worker, begun = self._begun.pop(node)
            reason, name = (begun.done() and begun.exception()) or e, self._crew.names[node]
            self._crew.workers.pop(node, None)
            worker.end()
            batch.lost += 1
            self._failed[node] = self._failed.get(node, 0) + 1
            if batch.lost >= TRIES:
                words = self._crew.words
                raise ResourceError(
                    f"{batch.units[0][0]}: {TRIES} workers ended while they {words.done} it and "
                    f"{len(batch.units) - 1} more, the last on {name}: {reason}",
                    f"Look there for what ended them, most often too little memory ({words.limits}); then run the "
                    f"same command again: {words.again}.",
                ) from None
            self._crew.tell(f"{name}: its worker was lost ({reason}); what it did is done again.")
            self._todo.appendleft(batch)
            self._looked = time.monotonic()  # a node that is gone is not listed any more the next time
            return False
        self._failed.pop(node, None)
        return True


def _on(error: MsconvError, node: str) -> MsconvError:
    """The same error, with the node's name."""
    return type(error)(f"On {node}: {error.message}", error.hint)

"""A cluster of threads: what goes to a worker and what it answers is pickled, as on the way to another machine."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msconv.stream.movers.cluster import Nodes
from msconv.stream.movers.node import Answer, Job, Look, NodeWorker, Seen
from msconv.stream.movers.workers import Cluster, Worker, WorkerLost
from msconv.stream.task import Unit


@dataclass
class Threads(Cluster):
    """Nodes by their names.  `sees`: where a node looks for the output directory instead.  `dies`: whether the
    worker of a node ends instead of doing these units.  `after`: what happens when a node has done some."""

    names: list[str]
    sees: dict[str, Path] = field(default_factory=dict)
    dies: Callable[[str, Sequence[Unit]], bool] = lambda node, units: False
    after: Callable[[str], None] = lambda node: None
    started: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    alive: list[Thread] = field(default_factory=list)

    def nodes(self) -> dict[str, str]:
        return {name: f"machine {name}" for name in self.names}

    def start(self, node: str, jobs: int) -> Worker:
        self.started.append(node)
        self.alive.append(Thread(self, node, jobs))
        return self.alive[-1]


class Thread(Worker):
    def __init__(self, cluster: Threads, node: str, jobs: int) -> None:
        self._cluster, self._node, self._worker = cluster, node, NodeWorker(jobs)
        self._pool = ThreadPoolExecutor(1)
        self._dead = threading.Event()

    def look(self, look: Look) -> Future[Seen]:
        place = self._cluster.sees.get(self._node)
        return self._ask(self._worker.look, replace(look, token=place / look.token.name) if place else look)

    def begin(self, job: Job) -> Future[None]:
        return self._ask(self._worker.begin, job)

    def work(self, units: Sequence[Unit]) -> Future[Answer]:
        return self._ask(self._work, units)

    def end(self) -> None:
        self._dead.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self in self._cluster.alive:
            self._cluster.alive.remove(self)

    def _work(self, units: Sequence[Unit]) -> Answer:
        if self._cluster.dies(self._node, units):
            self._dead.set()
        self._refuse_dead()
        answer = self._worker.work(units)
        self._cluster.moved.append(self._node)
        self._cluster.after(self._node)
        return answer

    def _ask(self, call: Callable[[Any], Any], value: Any) -> Future[Any]:
        packed = pickle.dumps(value)

        def run() -> Any:
            self._refuse_dead()
            return pickle.loads(pickle.dumps(call(pickle.loads(packed))))

        return self._pool.submit(run)

    def _refuse_dead(self) -> None:
        if self._dead.is_set():
            raise WorkerLost("killed")


def nodes_of(cluster: Cluster, said: list[str] | None = None) -> Nodes:
    return Nodes(cluster, 1, (said if said is not None else []).append)

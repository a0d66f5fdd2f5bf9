"""A mover whose workers are processes that begin with nothing but values: each opens source and outputs itself."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

from msconv.stream.buffers import Buffers
from msconv.stream.movers import Mover, Moving
from msconv.stream.source import Progress
from msconv.stream.task import Opened, Task, Unit
from msconv.stream.transform import Moved, Work, move_unit

_opened: list[Work] = []  # of a worker


def begin(values: bytes) -> None:
    """Open what a task's values name, in the process of a worker."""
    task: Task = pickle.loads(values)
    source, outputs = task.source.open(), task.outputs.open()
    source.expect((n for unit in task.plan.units for n in task.plan.reads(unit)), lambda n: None)
    _opened.append(Work(task.plan, source, outputs, Buffers(task.buffers), lambda n: None, lambda: False))


def move(unit: Unit, fatal: str) -> tuple[int, list[Moved]]:
    """Number of the worker's process, and what it moved: durably, since nobody can sync for another machine.
    The worker ends without a word before it moves the source `fatal`."""
    if fatal in unit:
        os._exit(1)
    (work,) = _opened
    moved = move_unit(work, unit)
    work.outputs.sync()
    return os.getpid(), moved


@dataclass(frozen=True)
class Processes(Mover):
    """So many processes.  `seen`: their numbers, once they have moved something."""

    jobs: int
    fatal: str = ""
    seen: set[int] = field(default_factory=set)

    def start(self, task: Task, units: Sequence[Unit], opened: Opened, progress: Progress) -> Moving:
        return _Processes(self, task, units, progress)


class _Processes(Moving):
    def __init__(self, mover: Processes, task: Task, units: Sequence[Unit], progress: Progress) -> None:
        self._mover, self._plan, self._progress = mover, task.plan, progress
        context, values = get_context("spawn"), pickle.dumps(task)
        self._pool = ProcessPoolExecutor(mover.jobs, context, begin, (values,))
        self._futures: dict[Future[tuple[int, list[Moved]]], Unit] = {
            self._pool.submit(move, unit, mover.fatal): unit for unit in units
        }

    def __iter__(self) -> Iterator[list[Moved]]:
        for future in as_completed(self._futures):
            process, moved = future.result()
            self._mover.seen.add(process)
            self._progress(self._plan.unit_bytes(self._futures[future]))
            yield moved

    def sync(self) -> None:
        """Workers have done so."""

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)

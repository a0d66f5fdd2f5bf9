"""Threads of this process: they share the open source and outputs, and each has its own buffers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..buffers import Buffers
from ..source import Progress
from ..task import Opened, Task, Unit
from ..transform import Moved, Stopped, Work, move_unit
from . import Mover, Moving


@dataclass(frozen=True)
class LocalThreads(Mover):
    """So many threads of this process."""

    jobs: int

    def start(self, task: Task, units: Sequence[Unit], opened: Opened, progress: Progress) -> Moving:
        return _Threads(self.jobs, task, units, opened, progress)


class _Threads(Moving):
    def __init__(self, jobs: int, task: Task, units: Sequence[Unit], opened: Opened, progress: Progress) -> None:
        self._task, self._opened, self._progress = task, opened, progress
        self._stop = threading.Event()
        self._units: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Moved] | BaseException | None] = queue.SimpleQueue()
        for unit in (*units, *[None] * jobs):
            self._units.put(unit)
        self._running = jobs
        self._threads = [threading.Thread(target=self._work, name=f"move-{i}", daemon=True) for i in range(jobs)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[list[Moved]]:
        while self._running:
            result = self._results.get()
            if result is None:
                self._running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result

    def sync(self) -> None:
        self._opened.outputs.sync()

    def stop(self) -> None:
        self._stop.set()
        if self._running:
            self._opened.source.interrupt()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            task, opened = self._task, self._opened
            buffers = Buffers(task.buffers)
            work = Work(task.plan, opened.source, opened.outputs, buffers, self._progress, self._stop.is_set)
            while (unit := self._units.get()) is not None and not self._stop.is_set():
                self._results.put(move_unit(work, unit))
            self._results.put(None)
        except Stopped:
            self._results.put(None)
        except BaseException as e:
            self._results.put(e)

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
    """Workers begin when the first result is asked for.  A signal may come between any two steps, so workers count
    themselves: `stop` returns when none is at work, and one that begins later finds nothing to do."""

    def __init__(self, jobs: int, task: Task, units: Sequence[Unit], opened: Opened, progress: Progress) -> None:
        self._task, self._opened, self._progress = task, opened, progress
        self._changed = threading.Condition()
        self._stopped = False
        self._working = 0
        self._units: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Moved] | BaseException | None] = queue.SimpleQueue()
        for unit in (*units, *[None] * jobs):
            self._units.put(unit)
        self._jobs = jobs

    def __iter__(self) -> Iterator[list[Moved]]:
        for i in range(self._jobs):
            threading.Thread(target=self._work, name=f"move-{i}", daemon=True).start()
        running = self._jobs
        while running:
            result = self._results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result

    def sync(self) -> None:
        self._opened.outputs.sync()

    def stop(self) -> None:
        self._stopped = True
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                if self._working:
                    self._opened.source.interrupt()
                with self._changed:
                    self._changed.wait_for(lambda: not self._working)
                break
            except KeyboardInterrupt as e:  # again: files that workers use must not be closed under them
                interrupted = e
        if interrupted is not None:
            raise interrupted

    def _work(self) -> None:
        with self._changed:
            if self._stopped:
                return
            self._working += 1
        try:
            task, opened = self._task, self._opened
            buffers = Buffers(task.buffers)
            work = Work(task.plan, opened.source, opened.outputs, buffers, self._progress, self._is_stopped)
            while (unit := self._units.get()) is not None and not self._stopped:
                self._results.put(move_unit(work, unit))
            self._results.put(None)
        except Stopped:
            self._results.put(None)
        except BaseException as e:
            self._results.put(e)
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def _is_stopped(self) -> bool:
        return self._stopped

"""What works on one node of a cluster: it opens a job's values there and does units of it.  To move units is one
job: it is answered for when their bytes are on the disk.

Written for storage that several machines mount, such as NFS: what one machine has closed, the next to open sees.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from msconv_runtime.errors import MsconvError

from ...workspace.names import TOOL
from ..source import FileState
from ..task import Opened, Task, Unit
from ..transform import Moved
from .threads import LocalThreads

SHOWS_WITHIN_S = 5.0  # a file that another machine just wrote: a directory may be remembered for a moment


@dataclass(frozen=True)
class Look:
    """What a node must see: this file with a text that the driver knows, and files that it reads as they were."""

    token: Path
    files: tuple[FileState, ...]


@dataclass(frozen=True)
class Seen:
    """What a node saw.  `token`: the file's text, or why there is none.  `different`: files that it reads."""

    host: str
    process: int
    tool: str
    token: str
    different: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What came of some units, or what went wrong: an error as a value keeps its words on the way."""

    results: tuple[Any, ...] = ()
    error: MsconvError | None = None


class Doing(Protocol):
    """A job that was begun."""

    def work(self, units: Sequence[Unit]) -> tuple[Any, ...]:
        """Do these units.  Raises MsconvError."""


class Job(Protocol):
    """What a worker is to do, as a value that can be pickled."""

    def open(self, jobs: int) -> Doing:
        """Begin, on this machine, with so many threads."""


class NodeWorker:
    """A worker of so many threads.  `look` comes first, `begin` once, then `work` again and again."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._doing: Doing | None = None

    def look(self, look: Look) -> Seen:
        """Say what this node sees."""
        different = tuple(problem for file in look.files if (problem := _difference(file)))
        return Seen(socket.gethostname(), os.getpid(), TOOL, _read(look.token), different)

    def begin(self, job: Job) -> None:
        """Open what the job needs."""
        self._doing = job.open(self._jobs)

    def work(self, units: Sequence[Unit]) -> Answer:
        """Do these units."""
        assert self._doing
        try:
            return Answer(self._doing.work(units))
        except MsconvError as e:
            return Answer(error=e)


@dataclass(frozen=True)
class MoveUnits(Job):
    """A task, whose units are moved by threads."""

    task: Task

    def open(self, jobs: int) -> Doing:
        return _Moves(self.task, LocalThreads(jobs))


class _Moves(Doing):
    def __init__(self, task: Task, threads: LocalThreads) -> None:
        self._task, self._threads, self._source = task, threads, task.source.open()

    def work(self, units: Sequence[Unit]) -> tuple[Moved, ...]:
        """Move these units; their bytes are on the disk, and the files closed, on return."""
        with self._task.outputs.open() as outputs:  # each time: what others wrote meanwhile is seen
            opened = Opened(self._source, outputs)
            moving = self._threads.start(self._task, units, opened, lambda n: None)
            try:
                moved = tuple(m for done in moving for m in done)
            finally:
                moving.stop()
            outputs.sync()
        return moved


def _read(path: Path) -> str:
    """The file's text.  It is waited for."""
    deadline = time.monotonic() + SHOWS_WITHIN_S
    while True:
        try:
            return path.read_text("utf-8", "replace")
        except FileNotFoundError:
            if time.monotonic() > deadline:
                return "no such file there"
            time.sleep(0.2)
        except OSError as e:
            return f"cannot be read there: {e.strerror}"


def _difference(file: FileState) -> str:
    """Why this is not the file that was planned with, or nothing."""
    try:
        now = Path(file.path).stat()
    except OSError as e:
        return f"{file.path}: {e.strerror}"
    if (now.st_size, now.st_mtime_ns) == (file.size, file.mtime_ns):
        return ""
    return (
        f"{file.path}: {now.st_size:,} bytes, not {file.size:,}"
        if now.st_size != file.size
        else f"{file.path}: modified at another time ({(now.st_mtime_ns - file.mtime_ns) / 1e9:+.3f} s)"
    )

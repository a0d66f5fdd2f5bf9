"""Who moves a plan's units: a mover starts workers.  `threads` are those of this process, `cluster` has one on
each node of a cluster, since a task is made of values.

A worker may report a unit before its bytes are on the disk; they are once `sync` returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from ..source import Progress
from ..task import Opened, Task, Unit
from ..transform import Moved

__all__ = ["Mover", "Moving"]


class Moving(Protocol):
    """Units that are on their way."""

    def __iter__(self) -> Iterator[list[Moved]]:
        """What was moved, unit by unit, in any order, as it is done.  Raises the first error of a worker."""

    def sync(self) -> None:
        """Return when all that was reported is on the disk.  Raises MsconvError, and then ever again."""

    def stop(self) -> None:
        """End the workers, wherever they are, and return when none works any more."""


class Mover(Protocol):
    """A way to have units moved."""

    def check(self, task: Task) -> None:
        """Raises MsconvError if the task cannot be done in this way.  Called with the directory held, before
        anything is written or deleted."""
        return

    def start(self, task: Task, units: Sequence[Unit], opened: Opened, progress: Progress) -> Moving:
        """Begin.  `opened`: the task's source and outputs in this process, for workers that live here; others open
        the task's own values.  `progress` gets the bytes that were read, from any thread."""

"""Work as values: what another process, or another machine with the same paths, needs to move units of a plan.

All of it can be pickled: paths, sizes, names, a plan.  Nothing of it is open; a descriptor, a lock or a thread is
made where the value is opened.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..layout.plan import Plan
from .buffers import BufferSizes
from .outputs import Outputs, RankFiles
from .source import Source, SourceLocation

Unit = tuple[str, ...]  # names of source tensors that are moved together


@dataclass(frozen=True)
class Task:
    """Units of this plan, from there to there.  A worker gets it once, then the units by their names."""

    plan: Plan
    source: SourceLocation
    outputs: RankFiles
    buffers: BufferSizes


@dataclass(frozen=True)
class Opened:
    """The source and the outputs of a task, open in this process."""

    source: Source
    outputs: Outputs

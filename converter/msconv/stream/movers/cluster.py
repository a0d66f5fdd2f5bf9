"""Nodes of a cluster move a plan's units.

The driver alone has the lock, the journal and READY.  A worker that goes on after its driver is gone does no harm:
it writes the bytes that the next run writes there too, or into files that have been unlinked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ...layout.plan import Plan
from ..source import Progress
from ..task import Opened, Task, Unit
from ..transform import Moved
from . import Mover, Moving
from .node import MoveUnits
from .readback import check_written
from .workers import Batch, Cluster, Crew, Handing, Words

BATCH_BYTES = 256 << 20  # read for one answer: what a lost worker does again
BATCHES_A_NODE = 4  # at least, so that no node waits long for the last
WORDS = Words(
    "conversion",
    "moved",
    "source files",
    "Give --output and the checkpoint on storage that every node mounts at the same path, and install this "
    "msconv on every node; or take the node out of the cluster.",
    "it resumes",
    "--jobs 1, --max-memory",
    "--jobs {}",
)


class Nodes(Mover):
    """All nodes of a cluster that see this machine's storage.  `tell`: who hears what people should know."""

    def __init__(self, cluster: Cluster, jobs: int, tell: Callable[[str], None]) -> None:
        self._crew = Crew(cluster, jobs, tell, WORDS)

    def check(self, task: Task) -> None:
        self._crew.gather(task.outputs.root, task.source.states())

    def start(self, task: Task, units: Sequence[Unit], opened: Opened, progress: Progress) -> Moving:
        opened.outputs.sync()  # headers and constants: this machine writes no more
        outputs = replace(task.outputs, root=task.outputs.root.absolute())
        task = replace(task, source=opened.source.elsewhere(), outputs=outputs)
        if (states := task.source.states()) != self._crew.files:  # they were downloaded only now
            self._crew.look_again(states)
        todo = batches(task.plan, units, len(self._crew.workers))
        return _Batches(Handing(self._crew, MoveUnits(task), todo), task, progress)

    def end(self) -> None:
        """End all workers."""
        self._crew.end()


def batches(plan: Plan, units: Sequence[Unit], nodes: int) -> deque[Batch]:
    """Units one after another, as they are given, mostly in the order of the source's files."""
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


class _Batches(Moving):
    def __init__(self, handing: Handing, task: Task, progress: Progress) -> None:
        self._handing, self._task, self._progress = handing, task, progress

    def __iter__(self) -> Iterator[list[Moved]]:
        for done in self._handing:
            check_written(self._task.outputs, self._task.plan, done.results, done.node)
            self._progress(done.batch.nbytes)
            yield list(done.results)

    def sync(self) -> None:
        """Workers have done so before they answered."""

    def stop(self) -> None:
        self._handing.stop()

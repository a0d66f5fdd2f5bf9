"""Running a plan: durable checkpoints while workers go on, files published at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msconv_runtime.errors import ArtifactError, ResourceError

from ..layout.plan import Plan
from .buffers import BufferSizes, buffer_sizes
from .journal import Journal
from .movers import Mover, Moving
from .outputs import allocate
from .source import Progress, Source
from .task import Opened, Task, Unit
from .transform import Moved

BLOCK_BYTES = 1 << 20  # stays in the processor cache between read and write: measured 1.2x of 16 MiB
SMALLEST_BLOCK = 256 << 10
CHECKPOINT_BYTES = 512 << 20  # read between two durable points: at most this is done again after a crash
LARGE_BYTES = 256 << 20  # of a unit that is moved early
BASE_BYTES = 96 << 20  # interpreter and libraries, measured
BYTES_PER_TENSOR = 4096  # plan, journal and manifest entries, measured


def ignore(n: int) -> None:
    """Take progress that nobody looks at."""


@dataclass(frozen=True)
class Watch:
    """Who hears of progress, in bytes: those that were moved, and those that came from elsewhere."""

    moved: Progress = ignore
    downloaded: Progress = ignore


def plan_memory(plan: Plan, jobs: int, max_memory: int | None, besides: int = 0) -> tuple[BufferSizes, int]:
    """(sizes of a worker's buffers, planned peak bytes).  `besides`: what the process takes for its source and its
    mover.  Raises ResourceError if the ceiling is too low."""
    fixed = besides + BASE_BYTES + BYTES_PER_TENSOR * (len(plan.sources) + len(plan.tensors) * plan.mesh.tp)
    sizes = buffer_sizes(plan, BLOCK_BYTES)
    if max_memory is not None and fixed + sizes.total(jobs) > max_memory:
        sizes = buffer_sizes(plan, SMALLEST_BLOCK)
        need = fixed + sizes.total(jobs)
        if need > max_memory:
            raise ResourceError(
                f"--max-memory {max_memory:,} bytes is too little: this plan needs at least {need:,} "
                f"with {jobs} jobs.",
                f"Try --max-memory {-(-need >> 20)}M" + (" or --jobs 1." if jobs > 1 else "."),
            )
    return sizes, fixed + sizes.total(jobs)


def execute(
    task: Task, source: Source, journal: Journal, mover: Mover, watch: Watch, extra_bytes: int = 0
) -> dict[str, Moved]:
    """Write all rank files and publish them.  Returns every source tensor's digests.

    Interrupted at any point, a later call with the same journal continues.  `source`: the task's, open here.
    `extra_bytes`: what will be written after the weights and must find room too.
    """
    plan = task.plan
    todo = [u for u in moving_order(plan, source) if not plan.is_done(u, journal.done)]
    watch.moved(plan.read_bytes - sum(plan.unit_bytes(u) for u in todo))
    with allocate(task.outputs, plan, not journal.done, extra_bytes) as outputs:
        for constant in plan.constants:
            for rank in plan.mesh.ranks:
                outputs.write_constant(plan, constant, rank)
        source.expect((n for unit in todo for n in (*plan.reads(unit), *plan.shared(unit))), watch.downloaded)
        _move(task, todo, Opened(source, outputs), journal, mover, watch.moved)
        try:
            source.check_unchanged()
        except ArtifactError:
            journal.remove()  # damaged bytes were moved: nothing of this is to be built upon
            raise
        outputs.sync()
        outputs.publish()
    return journal.done


def moving_order(plan: Plan, source: Source) -> list[Unit]:
    """Units as they lie in their files.  Where some are decoded or encoded, and all files are there, large ones
    (the embedding, the head) come early, the largest first, and after each as many bytes of others.  At the end
    one worker would be left alone with the head; and workers that copy two at the same time wait for the disk."""
    order = sorted(plan.units, key=lambda u: (plan.sources[u[0]].file, plan.sources[u[0]].offset))
    computes = bool(plan.encoded) or any(plan.is_decoded(u[0]) for u in order)
    if source.is_arriving or not computes:
        return order
    large = sorted((u for u in order if plan.unit_bytes(u) >= LARGE_BYTES), key=plan.unit_bytes, reverse=True)
    others = deque(u for u in order if plan.unit_bytes(u) < LARGE_BYTES)
    early: list[Unit] = []
    for unit in large:
        early.append(unit)
        size = plan.unit_bytes(unit)
        while others and size > 0:
            early.append(others.popleft())
            size -= plan.unit_bytes(early[-1])
    return [*early, *others]


def _move(
    task: Task, units: Sequence[Unit], opened: Opened, journal: Journal, mover: Mover, progress: Progress
) -> None:
    """Have the units moved, with a checkpoint after every so many bytes and one at the end, however it ends."""
    waiting: list[Moved] = []
    waiting_bytes = 0
    by_first = {unit[0]: unit for unit in units}
    moving = mover.start(task, units, opened, progress)
    try:
        for moved in moving:
            waiting += moved
            waiting_bytes += sum(task.plan.sources[m.name].nbytes for m in moved)
            if waiting_bytes >= CHECKPOINT_BYTES:
                _checkpoint(task, moving, journal, opened.source, waiting, by_first)
                waiting_bytes = 0
    finally:
        moving.stop()
        _checkpoint(task, moving, journal, opened.source, waiting, by_first)


def _checkpoint(
    task: Task,
    moving: Moving,
    journal: Journal,
    source: Source,
    waiting: list[Moved],
    by_first: Mapping[str, Unit],
) -> None:
    """Bytes first, then the journal that speaks of them, then the source may let go of them."""
    if waiting:
        moving.sync()
        journal.append(waiting)
        plan, done = task.plan, [by_first[m.name] for m in waiting if m.name in by_first]
        source.moved(n for unit in done for n in (*plan.reads(unit), *plan.shared(unit)))
        waiting.clear()

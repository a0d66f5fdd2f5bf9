"""Running a plan with some workers: sources in file order, durable checkpoints while the workers go on."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

from msconv_runtime.artifact import TensorEntry, WeightFile, digest_bytes, digest_of
from msconv_runtime.errors import ArtifactError, ResourceError

from ..layout.files import file_name
from ..layout.plan import Plan
from .buffers import Buffers, BufferSizes, buffer_sizes
from .journal import Journal
from .outputs import Outputs
from .source import Progress, Source
from .transform import Moved, Stopped, Work, move_unit

BLOCK_BYTES = 1 << 20  # stays in the processor cache between read and write: measured 1.2x of 16 MiB
SMALLEST_BLOCK = 256 << 10
CHECKPOINT_BYTES = 512 << 20  # read between two durable points: at most this is done again after a crash
BASE_BYTES = 96 << 20  # interpreter and libraries, measured
BYTES_PER_TENSOR = 4096  # plan, journal and manifest entries, measured


def plan_memory(plan: Plan, jobs: int, max_memory: int | None) -> tuple[BufferSizes, int]:
    """(sizes of a worker's buffers, planned peak bytes).  Raises ResourceError if the ceiling is too low."""
    fixed = BASE_BYTES + BYTES_PER_TENSOR * (len(plan.sources) + len(plan.tensors) * plan.mesh.tp)
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
    plan: Plan,
    source: Source,
    root: Path,
    journal: Journal,
    jobs: int,
    buffers: BufferSizes,
    progress: Progress,
    besides: int = 0,
    downloading: Progress = lambda n: None,
) -> dict[str, Moved]:
    """Write all rank files under `root` and publish them.  Returns every source tensor's digests.

    Interrupted at any point, a later call with the same journal continues.  `besides`: bytes that will be
    written after the weights, which must find room too.  `downloading` gets the bytes that come from elsewhere.
    """
    order = sorted(plan.units, key=lambda u: (plan.sources[u[0]].file, plan.sources[u[0]].offset))
    todo = [u for u in order if not plan.is_done(u, journal.done)]
    progress(plan.read_bytes - sum(plan.unit_bytes(u) for u in todo))
    with Outputs(root, plan, not journal.done, besides) as outputs:
        for constant in plan.constants:
            for rank in plan.mesh.ranks:
                outputs.write_constant(constant, rank)
        source.expect((n for unit in todo for n in plan.reads(unit)), downloading)
        _run(plan, source, outputs, journal, todo, jobs, buffers, progress)
        try:
            source.check_unchanged()
        except ArtifactError:
            journal.remove()  # damaged bytes were moved: nothing of this is to be built upon
            raise
        outputs.sync()
        outputs.publish()
    return journal.done


def _run(
    plan: Plan,
    source: Source,
    outputs: Outputs,
    journal: Journal,
    todo: list[tuple[str, ...]],
    jobs: int,
    buffers: BufferSizes,
    progress: Progress,
) -> None:
    stop = threading.Event()
    units: queue.SimpleQueue[tuple[str, ...] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[list[Moved] | BaseException | None] = queue.SimpleQueue()
    for unit in (*todo, *[None] * jobs):
        units.put(unit)

    def work() -> None:
        try:
            own = Work(plan, source, outputs, Buffers(buffers), progress, stop.is_set)
            while (unit := units.get()) is not None and not stop.is_set():
                results.put(move_unit(own, unit))
            results.put(None)
        except Stopped:
            results.put(None)
        except BaseException as e:
            results.put(e)

    workers = [threading.Thread(target=work, name=f"move-{i}", daemon=True) for i in range(jobs)]
    for worker in workers:
        worker.start()
    waiting: list[Moved] = []
    waiting_bytes = 0
    running = jobs
    try:
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                waiting += result
                waiting_bytes += sum(plan.sources[m.name].nbytes for m in result)
            if waiting_bytes >= CHECKPOINT_BYTES:
                _checkpoint(outputs, journal, source, waiting)
                waiting_bytes = 0
    finally:
        stop.set()
        if running:
            source.interrupt()
        for worker in workers:
            worker.join()
        _checkpoint(outputs, journal, source, waiting)


def _checkpoint(outputs: Outputs, journal: Journal, source: Source, waiting: list[Moved]) -> None:
    """Bytes first, then the journal that speaks of them, then the source may let go of them."""
    if waiting:
        outputs.sync()
        journal.append(waiting)
        source.moved(m.name for m in waiting)
        waiting.clear()


def describe(plan: Plan, moved: dict[str, Moved]) -> tuple[list[WeightFile], list[TensorEntry]]:
    """Manifest entries: every tensor's digest per rank, and from them every file's."""
    digests: dict[tuple[int, int, int], str] = {}
    for m in moved.values():
        digests.update(m.parts)
    per_rank: list[list[str]] = []
    constants = {c.tensor: c for c in plan.constants}
    for i, tensor in enumerate(plan.tensors):
        row = []
        for rank in plan.mesh.ranks:
            if i in constants:
                row.append(digest_of([digest_bytes(plan.constant_bytes(constants[i], rank))]))
            else:
                row.append(digest_of(digests[i, part, rank] for part in range(len(tensor.parts))))
        per_rank.append(row)
    files = [
        WeightFile(
            path=file_name(rank, index),
            rank=rank,
            size=file.size,
            digest=digest_of(
                [
                    digest_bytes(file.header),
                    *(per_rank[i][rank] for i, t in enumerate(plan.tensors) if t.file == index),
                ]
            ),
        )
        for rank in plan.mesh.ranks
        for index, file in enumerate(plan.files)
    ]
    entries = [
        TensorEntry(
            name=t.name,
            dtype=t.dtype,
            shape=list(t.shape),
            file=t.file,
            begin=len(plan.files[t.file].header) + t.begin,
            parts=list(t.parts),
            digests=per_rank[i],
        )
        for i, t in enumerate(plan.tensors)
    ]
    return files, entries

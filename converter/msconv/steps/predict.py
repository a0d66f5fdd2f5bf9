"""How long a conversion will take here, found by doing a second or two of it: the plan's own units, moved by the
conversion's own code from a sample on the disk to a scratch file beside it.

What a unit costs depends on its kind: whether codes are decoded, values encoded, matrices transposed or cast.
Each kind that counts is tried by itself, in as many threads as the conversion will have.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msconv_runtime.errors import MsconvError, ResourceError

from ..layout.model import TensorInfo
from ..layout.plan import Plan
from ..stream.execute import plan_memory
from ..stream.movers.threads import LocalThreads
from ..stream.outputs import Outputs, RankFiles
from ..stream.source import DirectoryShards, Source, read_exactly
from ..stream.task import Opened, Task, Unit
from .costs import Cost, Tried

SAMPLE_BYTES, SCRATCH_BYTES, LEAST_SCRATCH = 192 << 20, 2560 << 20, 512 << 20
ROUND_BYTES = 96 << 20  # of source bytes that are moved before the clock is looked at
TRIED_S = 0.8  # of each kind
SMALL = 0.03  # kinds with less of the bytes are taken to cost what the others do
LOW, HIGH = 0x30, 0x3F  # bytes that are finite values of every type, and positive ones
WRITE_OUT_EVERY = 16 << 20


@dataclass(frozen=True)
class Kind:
    """What makes one unit cost another time a byte than another."""

    source: str
    stored: str
    is_decoded: bool
    is_encoded: bool
    is_transposed: bool

    def __str__(self) -> str:
        words = [f"{self.source} to {self.stored}"]
        words += ["transposed"] if self.is_transposed else []
        return ", ".join(words)


def calibrate(plan: Plan, place: Path, jobs: int, max_memory: int | None, startup: float) -> Cost:
    """Try a plan's kinds of units in the directory `place`: bytes that the plan reads.  `startup`: seconds until a
    plan is made.  Raises ResourceError if there is no room for a sample."""
    begun = time.perf_counter()
    of_kind: dict[Kind, list[Unit]] = {}
    for unit in plan.units:
        of_kind.setdefault(kind_of(plan, unit), []).append(unit)
    sizes = {kind: sum(plan.unit_bytes(u) for u in units) for kind, units in of_kind.items()}
    whole = sum(sizes.values())
    buffers, most = plan_memory(plan, jobs, max_memory)
    tried: list[Tried] = []
    scratch_bytes = min(SCRATCH_BYTES, max(LEAST_SCRATCH, plan.output_bytes))
    with sample(place, scratch_bytes) as (source, outputs):
        task = Task(plan, DirectoryShards({}), RankFiles(place, 1, 1), buffers)
        opened = Opened(source, outputs)
        for kind in sorted(of_kind, key=lambda k: -sizes[k]):
            rate, warm = 0.0, 0.0
            if sizes[kind] >= SMALL * whole:
                rate, warm = _rate(task, opened, LocalThreads(jobs), of_kind[kind])
            startup += warm
            tried.append(Tried(kind, sizes[kind], rate))
    if not any(t.per_s for t in tried):
        raise ResourceError(f"{place}: no part of this plan could be tried there.", "Leave --predict out.")
    return Cost(startup, tuple(tried), plan.read_bytes, most, time.perf_counter() - begun)


def kind_of(plan: Plan, unit: Unit) -> Kind:
    name = unit[0]
    move = plan.moves[name][0]
    stored = plan.tensors[move.tensor].dtype
    return Kind(plan.sources[name].dtype, stored, plan.is_decoded(name), name in plan.encoded, move.is_transposed)


def _rate(task: Task, opened: Opened, mover: LocalThreads, units: Sequence[Unit]) -> tuple[float, float]:
    """(source bytes a second, seconds that only the first round takes); 0 for units that a sample cannot be.
    As in a conversion, threads take one unit after another, the disk works meanwhile, and is waited for after
    many.  The first round is slower, so a second one says how many are enough."""
    chosen = _round(task.plan, units)
    if not chosen:
        return 0.0, 0.0
    size = sum(task.plan.unit_bytes(u) for u in chosen)
    try:
        first = _move(task, opened, mover, chosen)
        opened.outputs.sync()
        rounds, moved = 1, 0.0
        while moved < TRIED_S / 2:
            rounds = math.ceil(rounds * min(TRIED_S / moved, 8)) if moved else 1
            started = time.perf_counter()
            moved = _move(task, opened, mover, chosen * rounds)
            opened.outputs.sync()
            seconds = time.perf_counter() - started
    except MsconvError:
        return 0.0, 0.0
    return size * rounds / seconds, max(0.0, first - moved / rounds)


def _round(plan: Plan, units: Sequence[Unit]) -> list[Unit]:
    """Units from the middle on, where layers are, of about ROUND_BYTES, and two at least: threads share them."""
    chosen: list[Unit] = []
    size = 0
    begin = len(units) // 2
    for unit in (*units[begin:], *units[:begin]):
        if any(plan.checked.get(name) for name in unit):
            continue  # those are compared with what a sample has not
        chosen.append(unit)
        size += plan.unit_bytes(unit)
        if size >= ROUND_BYTES and len(chosen) > 1:
            break
    return chosen


def _move(task: Task, opened: Opened, mover: LocalThreads, units: Sequence[Unit]) -> float:
    """Seconds of one round, until all is written, which the disk need not have yet."""
    started = time.perf_counter()
    moving = mover.start(task, units, opened, lambda n: None)
    try:
        for _ in moving:
            pass
    finally:
        moving.stop()
    return time.perf_counter() - started


@contextmanager
def sample(place: Path, scratch_bytes: int = SCRATCH_BYTES) -> Iterator[tuple[Source, Outputs]]:
    """A file to read from, cold, and one to write to, in `place`; both are gone afterwards."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    if free < SAMPLE_BYTES + 2 * scratch_bytes:
        raise ResourceError(f"{place}: {free >> 20} MiB are free, too few for a sample.", "Leave --predict out.")
    try:
        with (
            tempfile.TemporaryFile(dir=place, prefix=".msconv-sample-") as source,
            tempfile.TemporaryFile(dir=place, prefix=".msconv-scratch-") as scratch,
        ):
            block = np.random.default_rng(0).integers(LOW, HIGH, 16 << 20, np.uint8).tobytes()
            for _ in range(SAMPLE_BYTES // len(block)):
                source.write(block)
            source.flush()
            os.fdatasync(source.fileno())
            os.posix_fallocate(scratch.fileno(), 0, scratch_bytes)
            yield SampleSource(source.fileno(), place), Scratch(scratch.fileno(), place, scratch_bytes)
    except OSError as e:
        raise ResourceError(
            f"{place}: a sample cannot be written there: {e.strerror}.", "Give --output."
        ) from None


class _Turns:
    """Places in a file, one after another and from the beginning again; threads take them in turn."""

    def __init__(self, size: int) -> None:
        self._size, self._at, self._lock = size, 0, threading.Lock()

    def take(self, count: int) -> tuple[int, bool]:
        """(where, whether it began anew)."""
        with self._lock:
            anew = self._at + count > self._size
            at = 0 if anew else self._at
            self._at = at + count
            return at, anew


class SampleSource(Source):
    """Gives the sample's bytes for any tensor, read as the conversion reads: with pread, and cold."""

    def __init__(self, fd: int, place: Path) -> None:
        self._fd, self._place, self._turns = fd, place, _Turns(SAMPLE_BYTES)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._forget()

    def read(self, info: TensorInfo, begin: int, out: memoryview) -> None:
        for first in range(0, len(out), SAMPLE_BYTES):
            piece = out[first : first + SAMPLE_BYTES]
            at, anew = self._turns.take(len(piece))
            if anew:
                self._forget()
            read_exactly(self._fd, piece, at, self._place)

    def release(self, info: TensorInfo) -> None:
        """All of it is forgotten at once when it is read again: other threads have read ahead in it."""

    def check_unchanged(self) -> None:
        """Nobody else knows it."""

    def elsewhere(self) -> DirectoryShards:
        raise NotImplementedError("a sample is read here only")

    def close(self) -> None:
        """Its file is closed by who made it."""

    def _forget(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class Scratch(Outputs):
    """Takes what is written for any rank's file, one after another, and starts it towards the disk as often."""

    def __init__(self, fd: int, place: Path, size: int) -> None:
        self.files = RankFiles(place, 1, 1)
        self._fds = {(0, 0): fd}
        self._unstarted = {}
        self._lock = threading.Lock()
        self._error = None
        self._turns = _Turns(size)

    def write(self, rank: int, file: int, offset: int, data: memoryview) -> None:
        for first in range(0, len(data), WRITE_OUT_EVERY):
            piece = data[first : first + WRITE_OUT_EVERY]
            super().write(0, 0, self._turns.take(len(piece))[0], piece)

"""What a conversion would cost, from headers alone and a quick look at this disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from msconv_runtime.errors import PlanError

from ..checkpoint.directory import Checkpoint
from ..checkpoint.drafts import with_draft
from ..layout.checks import TP_CHOICES
from ..layout.cuts import Mesh, make_mesh
from ..layout.memory import DeviceMemory, kv_bytes_per_token
from ..layout.model import expected_sources
from ..layout.plan import Plan
from ..layout.planning import examine, lay_out
from ..location import Location, bytes_to_download
from ..process import since_start
from ..quant import format_asked
from ..stream.execute import plan_memory
from ..workspace.names import default_output
from .costs import Cost
from .predict import calibrate

PROBE_BYTES, PROBE_STEP, PROBE_S = 64 << 20, 8 << 20, 1.0


@dataclass(frozen=True)
class Estimate:
    """`seconds` None: the output's disk could not be tried.  `free_bytes`: there, None if it cannot be known;
    `lacking_bytes`: more than is free that output and download need, and `lacking_without_source` if the download
    is deleted as it is read.  `smallest_tp` None: no device size was given, or
    nothing fits.  `assumed`: there are no weights yet, shapes come from the configuration.
    `calibration`: what `seconds` are from, where the conversion was tried.  `place`: the nearest directory to the
    output's that is there.  `startup`: seconds of this process until the plan was made.
    `model_kv_bytes_per_token`: without a draft's."""

    checkpoint: Checkpoint
    plan: Plan
    device: DeviceMemory
    peak_memory_bytes: int
    download_bytes: int
    seconds: float | None
    smallest_tp: int | None
    assumed: bool
    model_kv_bytes_per_token: int = 0
    place: Path = Path()
    startup: float = 0.0
    free_bytes: int | None = None
    lacking_bytes: int = 0
    lacking_without_source: int = 0
    calibration: Cost | None = None


def estimate(
    model: Location,
    tp: int,
    ep: int,
    dtype: str | None,
    output: Path | None,
    jobs: int,
    max_memory: int | None,
    context: int,
    batch: int,
    device_bytes: int | None,
    harmless: Collection[str] = (),
    quant: str | None = None,
    drafts: bool = True,
    predict: bool = False,
) -> Estimate:
    """Plan without moving anything.  `predict`: try the conversion for a second or two instead of the disk for a
    moment.  Raises whatever `convert` would raise beforehand."""
    mesh = make_mesh(tp, ep)
    checkpoint = model.open_configuration(harmless)
    assumed = not model.has_weights()
    if not assumed:
        checkpoint = model.open_checkpoint(harmless)
    checkpoint = with_draft(checkpoint, drafts)
    table, sizes = checkpoint.family.table, checkpoint.config.sizes()
    sources = checkpoint.tensors
    if assumed:
        sources = expected_sources(table, sizes, checkpoint.config.dtype or "bfloat16", quantised=True)
    made = format_asked(quant)
    found = examine(table, sizes, sources, dtype, made)
    plan = lay_out(found, sizes, sources, mesh, dtype, quant=made)

    def memory(p: Plan) -> DeviceMemory:
        return DeviceMemory(p.rank_bytes, kv_bytes_per_token(sizes, p.mesh, p.dtype), context, batch)

    def laid_out(choice: int) -> Plan:
        return lay_out(found, sizes, sources, Mesh(choice), dtype, quant=made)

    target = output or default_output(checkpoint.name, tp, ep)
    download_bytes = plan.read_bytes if assumed else bytes_to_download(model, plan)
    startup = since_start()
    measured = calibrate(plan, existing(target), jobs, max_memory, startup) if predict else None
    return Estimate(
        checkpoint=checkpoint,
        plan=plan,
        device=memory(plan),
        peak_memory_bytes=plan_memory(plan, jobs, max_memory, model.buffered_bytes)[1],
        download_bytes=download_bytes,
        seconds=measured.seconds if measured else _seconds(plan, target),
        model_kv_bytes_per_token=kv_bytes_per_token(replace(sizes, drafts=0), mesh, plan.dtype),
        place=existing(target),
        startup=startup,
        free_bytes=_free(target),
        lacking_bytes=_lacking(target, plan.output_bytes, download_bytes),
        lacking_without_source=_lacking(target, plan.output_bytes, 0),
        smallest_tp=_smallest_tp(laid_out, memory, device_bytes) if device_bytes else None,
        assumed=assumed,
        calibration=measured,
    )


def _smallest_tp(
    laid_out: Callable[[int], Plan], memory: Callable[[Plan], DeviceMemory], device_bytes: int
) -> int | None:
    """The fewest ranks on whose devices the model fits.  More ranks hold no less together than fewer: a number
    whose share of that is too large already is not laid out, which takes seconds for a large model."""
    together = 0
    for choice in TP_CHOICES:
        if together > choice * device_bytes:
            continue
        try:
            plan = laid_out(choice)
        except PlanError:
            continue
        if memory(plan).fits(device_bytes):
            return choice
        together = plan.output_bytes
    return None


def existing(path: Path) -> Path:
    """The nearest directory that exists already."""
    return next((p for p in (path, *path.parents) if p.is_dir()), Path())


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(existing(path)).free
    except OSError:
        return None


def _lacking(target: Path, output_bytes: int, download_bytes: int) -> int:
    """Bytes that are not free: where the output goes, where downloads go, or for both on one disk."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    try:
        together = existing(target).stat().st_dev == existing(cache).stat().st_dev
    except OSError:
        together = False
    wanted = [(target, output_bytes + download_bytes * together), (cache, download_bytes * (not together))]
    lacks = [size - free for place, size in wanted if size and (free := _free(place)) is not None]
    return max(0, *lacks, 0)


def _seconds(plan: Plan, target: Path) -> float | None:
    """Reading and writing at the rate that a probe of some megabytes, or a second, reaches where the output would
    be."""
    place = existing(target)
    block, size = os.urandom(1 << 20) * (PROBE_STEP >> 20), 0
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".msconv-probe-") as f:
            started = time.perf_counter()
            while size < PROBE_BYTES and time.perf_counter() - started < PROBE_S:
                size += f.write(block)
                f.flush()
                os.fdatasync(f.fileno())
            written = time.perf_counter() - started
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            f.seek(0)
            while f.read(1 << 20):
                pass
            read = time.perf_counter() - started
    except OSError:
        return None
    return (plan.read_bytes * read + plan.output_bytes * written) / size

"""Checkpoint in, artifact out: opens and plans.  `conversion` carries it out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..checkpoint.drafts import draft_of, with_draft
from ..layout.cuts import make_mesh
from ..layout.planning import make_plan
from ..location import Location, bytes_to_download
from ..quant import format_asked
from ..stream.entries import dropped_tensors
from ..stream.execute import plan_memory
from ..stream.outputs import RankFiles
from ..stream.task import Task
from ..workspace.names import DOWNLOADS, default_output
from ..workspace.recording import model_of
from .conversion import Conversion, identify


def prepare(
    model: Location,
    tp: int,
    ep: int = 1,
    dtype: str | None = None,
    output: Path | None = None,
    jobs: int = 1,
    max_memory: int | None = None,
    delete_source: bool = False,
    harmless: Collection[str] = (),
    quant: str | None = None,
    drafts: bool = True,
    besides: int = 0,
) -> Conversion:
    """Read headers and plan.  Moves nothing; of a repository, only small files are downloaded.
    `delete_source`: its shards go to the output's own directory and are deleted as their bytes are in place.
    `harmless`: keys of config.json, on no list, that a person says change nothing.  `quant`: what matrices are
    quantised to, one of QUANT.  `drafts`: take the layer of multi-token prediction, if it is there.
    `besides`: bytes that a process takes for its mover's sake.
    Raises any MsconvError there is to raise beforehand."""
    mesh = make_mesh(tp, ep)
    model.bring_small()
    checkpoint = model.open_checkpoint(harmless)
    if quant:
        checkpoint = checkpoint.bare()
    checkpoint = with_draft(checkpoint, drafts)
    origin = model.origin()
    table, sizes = checkpoint.family.table, checkpoint.config.sizes()
    plan = make_plan(table, sizes, checkpoint.tensors, mesh, dtype, quant=format_asked(quant))
    buffers, planned = plan_memory(plan, jobs, max_memory, besides + model.buffered_bytes)
    output = output or default_output(checkpoint.name, tp, ep)
    if delete_source:
        model = model.deleting_into(output / DOWNLOADS)
    return Conversion(
        name=checkpoint.name,
        model=model_of(checkpoint, plan.parameters),
        shards=checkpoint.files,
        task=Task(plan, model.shards(checkpoint), RankFiles(output, mesh.tp, len(plan.files)), buffers),
        identity=identify(
            [*(f.identity for f in checkpoint.files.values()), *filter(None, [checkpoint.description])],
            checkpoint.config_digest,
            plan,
        ),
        reads=checkpoint.root,
        origin=origin,
        auxiliary=checkpoint.auxiliary,
        dropped=dropped_tensors(plan),
        source_dtype=plan.source_dtype,
        jobs=jobs,
        planned_memory_bytes=planned,
        download_bytes=bytes_to_download(model, plan),
        notes=checkpoint.notes,
        config=checkpoint.config_bytes,
        draft=draft_of(checkpoint.config),
        made=quant or "",
    )

"""`msconv compile`: static graphs into the artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msconv_runtime.artifact import Artifact
from msconv_runtime.draft_kinds import TITLES
from msconv_runtime.targets import FUSIONS, ONNX, TARGETS, target_named
from msconv_runtime.units import human_bytes

from ..checkpoint.hubs import Hub
from ..checkpoint.reference import configuration
from ..graph.spec import Fixed
from ..location import open_reference
from ..workspace.clearing import refuse_inside
from .command import Command
from .console import find_artifact, say
from .here import quoted, usual_target
from .interrupts import leaving_at_once
from .options import (
    UserPath,
    artifact_argument,
    complete_targets,
    grouped,
    no_drafts_option,
    output_option,
    quant_option,
)
from .phases import phases
from .references import compare_layout, convert_command, model_option, recipe_option, source_option
from .report import refresh
from .result import Result, json_option, show

if TYPE_CHECKING:
    from ..steps.compile import Compiled


def _fusing(between: str) -> str:
    """Names of the targets that fuse something."""
    return between.join(t.name for t in TARGETS.values() if t.fusions)


@dataclass(frozen=True)
class Asked:
    """How graphs are to be made.  `kept`: where they are kept.  `shapes`: None for no graphs of fixed shapes, ""
    for the usual ones.  `fused`: what graphs of the targets that were named shall have as one operation."""

    kept: Path | None
    shapes: str | None
    fused: tuple[str, ...]

    @classmethod
    def of(cls, kept: Path | None, onnx_static: bool, onnx_shapes: str | None, fused: tuple[str, ...]) -> Asked:
        if onnx_shapes is not None and not onnx_static:
            raise click.UsageError("--onnx-shapes goes with --onnx-static.")
        if kept is not None:
            refuse_inside(kept / "any", "--graphs")
        return cls(kept, (onnx_shapes or "") if onnx_static else None, tuple(sorted(set(fused))))

    def check(self, targets: tuple[str, ...]) -> None:
        """Raises click.UsageError for what needs a target that was not named."""
        if self.fused and not targets:
            raise click.UsageError(f"--fuse goes with --target {_fusing(' or ')}.")
        if self.shapes is not None and ONNX.name not in targets:
            raise click.UsageError(f"--onnx-static goes with --target {ONNX.name}.")

    def fixed(self, root: Path) -> Fixed | None:
        """The shapes for the artifact's model."""
        if self.shapes is None:
            return None
        return Fixed.of(self.shapes, configuration(Artifact(root)).max_positions)


asked_options = grouped(
    "asked",
    Asked.of,
    click.option(
        "--graphs",
        "kept",
        type=UserPath(),
        envvar="MSCONV_GRAPHS",
        help="A directory that keeps graphs: those compiled before for the same are taken from it, others are "
        "left there.  [variable: MSCONV_GRAPHS]",
    ),
    click.option(
        "--onnx-static",
        is_flag=True,
        help="With --target onnx: prefill and decode of fixed shapes too, plain operators.",
    ),
    click.option(
        "--onnx-shapes",
        metavar="BATCHxTOKENSxCONTEXT",
        help="Those shapes: sequences, new tokens of a prefill, places in the cache.  [default: 1x128x1024, or "
        "what the model takes]",
    ),
    click.option(
        "--fuse",
        "fused",
        multiple=True,
        type=click.Choice(FUSIONS),
        help=f"With --target {_fusing(' or ')}: one operation where graphs have several; swiglu is an MLP's "
        "activation.  No device has run such graphs.  Repeatable.",
    ),
)
layout_options = grouped(
    "layout",
    lambda tp, ep: (tp, ep),
    click.option("--tp", type=click.IntRange(1, 1024), help="With --model: tensor-parallel ranks."),
    click.option("--ep", default=1, type=click.IntRange(1, 1024), help="With --model: expert-parallel ranks."),
)


drafts_options = grouped(
    "drafts",
    lambda draft, no_drafts: (draft, no_drafts),
    click.option(
        "--draft",
        metavar="REF",
        help=f"A draft of {TITLES}, as an artifact, a directory or owner/name: graphs shall give the hidden "
        "states that it reads.",
    ),
    no_drafts_option,
)


@click.command("compile", cls=Command)
@artifact_argument
@click.option(
    "--target",
    "targets",
    multiple=True,
    shell_complete=complete_targets,
    help=f"{', '.join(list(TARGETS)[:-1])} or {list(TARGETS)[-1]}.  Repeatable.  "
    "[default: what it has graphs for, or this machine's device]",
)
@model_option("Without weights: a directory with config.json, owner/name[@revision], or a recipe's name.")
@recipe_option
@layout_options
@quant_option
@drafts_options
@output_option("With --model: the artifact to make.")
@asked_options
@source_option
@json_option
def command(
    artifact: Path | None,
    targets: tuple[str, ...],
    model: str | None,
    layout: tuple[int | None, int],
    quant: str | None,
    drafts: tuple[str | None, bool],
    output: Path | None,
    asked: Asked,
    hub: Hub,
) -> None:
    """Compile an artifact's static graphs, ahead of time, for one or more targets.

    Needs no accelerator; the files hold no weight bytes and are the same for every rank.

    \b
    msconv compile                                   the newest artifact in artifacts/
    msconv compile artifacts/Qwen3-8B-tp4 --recipe Qwen3-8B
    msconv compile artifacts/Qwen3-8B-tp4 --target ascend910b --target cpu
    msconv compile artifacts/Qwen3-8B-tp4 --target ascend910b --fuse swiglu
    msconv compile --model models/Qwen3-32B --tp 8 --target ascend910b --output graphs-only
    """
    from ..graph.store import GraphStore
    from ..steps import compile as compiler

    (tp, ep), (draft, no_drafts) = layout, drafts
    compiler.refuse_fusions([target_named(name) for name in targets], asked.fused)
    asked.check(targets)  # before anything is made
    if model is not None:
        _refuse_without_weights(targets)
        if artifact is not None or tp is None or output is None:
            raise click.UsageError("--model needs --tp and --output, and no ARTIFACT.")
        root = output
        location = open_reference(model, hub, weights=False)
        compiler.begin_without_weights(location, tp, ep, root, quant, not no_drafts)
    elif tp is not None or output is not None:
        raise click.UsageError("--tp and --output go with --model; an artifact has its own.")
    elif no_drafts:
        raise click.UsageError("--no-drafts goes with --model; an artifact has a draft or none.")
    else:
        root = find_artifact(artifact)
        compare_layout(Artifact(root).manifest)
    made: list[Compiled] = []
    before = _expect(root, draft, hub) if draft else []
    fusing = set(targets)  # no others, which --draft makes anew
    targets = (*targets, *before) or (usual_target(Artifact(root)),)
    store = None if asked.kept is None else GraphStore(asked.kept)
    fixed, made_of = asked.fixed(root), quant if model is not None else None
    for target in dict.fromkeys(targets):
        with phases(f"compiling for {target}") as tell, leaving_at_once():
            fused = asked.fused if target in fusing else ()
            done = compiler.compile_graphs(root, target, say, tell, made_of, store, fixed, fused)
        for compiled in done:
            say(_line(compiled))
        made += done
        refresh(root)
    next_step = f"msconv verify {quoted(root)} --target {made[-1].graph.target}"
    if tp is not None and Artifact(root).manifest.weights is None:
        next_step = f"{convert_command(tp, ep)} --output {quoted(root)}  # adds the weights"
    show(Result({"artifact": str(root), "graphs": [_data(root, m) for m in made]}, next=next_step))


def _expect(root: Path, draft: str, hub: Hub) -> list[str]:
    from ..steps.drafts import expect_draft

    return expect_draft(root, draft, hub)


def _refuse_without_weights(targets: tuple[str, ...]) -> None:
    if points := [name for name in targets if target_named(name).form.points_at_weights]:
        raise click.UsageError(
            f"--target {points[0]}: its files point at the weights; convert first, then compile the artifact."
        )


def _data(root: Path, compiled: Compiled) -> dict[str, Any]:
    graph = compiled.graph
    return {
        "target": graph.target,
        "phase": graph.phase,
        "role": graph.role,
        "variant": graph.variant,
        "path": str(root / graph.path),
        "nodes": graph.nodes,
        "fused": graph.fused,
        "seconds": round(compiled.seconds, 3),
        "peak_rss_bytes": compiled.peak_rss_bytes,
        "taken": compiled.taken,
    }


def _line(compiled: Compiled) -> str:
    graph = compiled.graph
    made = f"peak memory {human_bytes(compiled.peak_rss_bytes)}"
    return (
        f"{graph.path}: {graph.nodes} nodes, {human_bytes(graph.size)}, {compiled.seconds:.1f} s, "
        + (f"{', '.join(graph.fused)} fused, " if graph.fused else "")
        + f"{'taken from --graphs' if compiled.taken else made}"
    )

"""`msconv compile`: static graphs into the artifact."""

from __future__ import annotations

from pathlib import Path

import click

from msconv_runtime.artifact import Artifact
from msconv_runtime.targets import CPU, TARGETS

from ..checkpoint.reference import Hub
from ..location import open_reference
from .command import Command
from .console import (
    artifact_argument,
    complete_targets,
    emit,
    find_artifact,
    human,
    json_option,
    say,
    step,
)
from .references import compare_layout, convert_command, model_option, recipe_option, source_option
from .report import refresh


@click.command("compile", cls=Command)
@artifact_argument
@click.option(
    "--target",
    "targets",
    multiple=True,
    shell_complete=complete_targets,
    help=f"{', '.join(list(TARGETS)[:-1])} or {list(TARGETS)[-1]}.  Repeatable.  [default: {CPU.name}]",
)
@model_option(False, "Without weights: a directory with config.json, owner/name[@revision], or a recipe's name.")
@recipe_option
@click.option("--tp", type=click.IntRange(1, 1024), help="With --model: tensor-parallel ranks.")
@click.option("--ep", default=1, type=click.IntRange(1, 1024), help="With --model: expert-parallel ranks.")
@click.option("--output", type=click.Path(path_type=Path), help="With --model: the artifact to make.")
@source_option
@json_option
def command(
    artifact: Path | None,
    targets: tuple[str, ...],
    model: str | None,
    tp: int | None,
    ep: int,
    output: Path | None,
    hub: Hub,
    as_json: bool,
) -> None:
    """Compile an artifact's static graphs, ahead of time, for one or more targets.

    Needs no accelerator; the files hold no weight bytes and are the same for every rank.

    \b
    msconv compile                                   the newest artifact in artifacts/
    msconv compile artifacts/Qwen3-8B-tp4 --recipe Qwen3-8B
    msconv compile artifacts/Qwen3-8B-tp4 --target ascend910b --target cpu
    msconv compile --model models/Qwen3-32B --tp 8 --target ascend910b --output graphs-only
    """
    from ..steps import compile as compiler

    if model is not None:
        if artifact is not None or tp is None or output is None:
            raise click.UsageError("--model needs --tp and --output, and no ARTIFACT.")
        root = output
        compiler.begin_without_weights(open_reference(model, hub, weights=False), tp, ep, root)
    elif tp is not None or output is not None:
        raise click.UsageError("--tp and --output go with --model; an artifact has its own.")
    else:
        root = find_artifact(artifact)
        compare_layout(Artifact(root).manifest)
    made = []
    for target in dict.fromkeys(targets or (CPU.name,)):
        with step(f"compiling for {target}"):
            done = compiler.compile_graphs(root, target, say)
        for m in done:
            say(
                f"{m.graph.path}: {m.graph.nodes} nodes, {human(m.graph.size)}, {m.seconds:.1f} s, "
                f"peak memory {human(m.peak_rss_bytes)}"
            )
        made += done
        refresh(root)
    if as_json:
        emit(
            {
                "artifact": str(root),
                "graphs": [
                    {
                        "target": m.graph.target,
                        "phase": m.graph.phase,
                        "role": m.graph.role,
                        "variant": m.graph.variant,
                        "path": str(root / m.graph.path),
                        "nodes": m.graph.nodes,
                        "seconds": round(m.seconds, 3),
                        "peak_rss_bytes": m.peak_rss_bytes,
                    }
                    for m in made
                ],
            }
        )
    if model is not None and Artifact(root).manifest.weights is None:
        assert tp is not None
        say(f"Next: {convert_command(tp, ep)} --output {root} adds the weights")
    else:
        say(f"Next: msconv verify {root} --target {made[-1].graph.target}")

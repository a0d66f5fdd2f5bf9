"""`msconv compile`: static graphs into the artifact."""

from __future__ import annotations

from pathlib import Path

import click

from .console import artifact_argument, emit, find_artifact, human, json_option, say, step


@click.command("compile")
@artifact_argument
@click.option("--target", "targets", multiple=True, help="cpu.  Repeatable.  [default: cpu]")
@json_option
def command(artifact: Path | None, targets: tuple[str, ...], as_json: bool) -> None:
    """Compile an artifact's static graphs, ahead of time, for one or more targets.

    Needs no accelerator; the files hold no weight bytes and are the same for every rank.

    \b
    msconv compile                                   the newest artifact in artifacts/
    msconv compile artifacts/Qwen3-8B-tp4 --target cpu
    """
    from .. import compile as compiler

    root = find_artifact(artifact)
    made = []
    for target in dict.fromkeys(targets or ("cpu",)):
        with step(f"compiling prefill and decode for {target}"):
            done = compiler.compile_graphs(root, target)
        for m in done:
            say(
                f"{m.graph.path}: {m.graph.nodes} nodes, {human(m.graph.size)}, {m.seconds:.1f} s, "
                f"peak memory {human(m.peak_rss_bytes)}"
            )
        made += done
    if as_json:
        emit(
            {
                "artifact": str(root),
                "graphs": [
                    {
                        "target": m.graph.target,
                        "phase": m.graph.phase,
                        "path": str(root / m.graph.path),
                        "nodes": m.graph.nodes,
                        "seconds": round(m.seconds, 3),
                        "peak_rss_bytes": m.peak_rss_bytes,
                    }
                    for m in made
                ],
            }
        )
    say(f"Next: msconv verify {root} --target {made[-1].graph.target}")

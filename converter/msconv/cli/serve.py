"""`msconv serve`: the exact SGLang command, printed and run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from msconv_runtime.artifact import read_manifest
from msconv_runtime.integrity import check_graphs
from msconv_runtime.sglang.launch import CHECK_DIGESTS, STRICT_AOT, plan_launch

from .console import artifact_argument, emit, find_artifact, json_option, say


@click.command("serve", context_settings={"ignore_unknown_options": False})
@artifact_argument
@click.option("--device", type=click.Choice(["cpu", "npu"]), default="cpu", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=30000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--check-digests", is_flag=True, help="Compare every byte with the manifest before loading.")
@click.option(
    "--strict-aot/--no-strict-aot",
    default=True,
    show_default=True,
    help="Refuse to start if batches of other shapes would be compiled for.",
)
@click.option("--print-command", is_flag=True, help="Only print the command; start nothing.")
@click.argument("sglang_args", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(
    artifact: Path | None,
    device: str,
    host: str,
    port: int,
    check_digests: bool,
    strict_aot: bool,
    print_command: bool,
    sglang_args: tuple[str, ...],
    as_json: bool,
) -> None:
    """Serve an artifact with SGLang.

    Prints the exact command and environment and becomes that process: signals and the exit code are SGLang's.
    Everything after -- goes to SGLang unchanged and wins over what msconv would say.

    \b
    msconv serve artifacts/Qwen3-0.6B-tp1 --port 30000
    msconv serve artifacts/Qwen3-0.6B-tp1 -- --max-total-tokens 8192 --log-level debug
    """
    extra = list(sglang_args)
    if artifact is not None and str(artifact).startswith("-"):
        extra.insert(0, str(artifact))  # `msconv serve -- --flag`: there was no artifact
        artifact = None
    root = find_artifact(artifact)
    launch = plan_launch(root, device, host, port, extra)
    if check_digests:
        launch.environment[CHECK_DIGESTS] = "1"
    if not strict_aot:
        launch.environment[STRICT_AOT] = "0"
    if as_json:
        emit({"argv": launch.argv, "environment": launch.environment})
    if print_command:
        if not as_json:
            click.echo(launch.shell())
        return
    manifest = read_manifest(root)
    if manifest.proof_for("cpu") is None or check_graphs(root, manifest):
        say(f"Warning: {root} is UNPROVEN for {device}; `msconv verify {root}` compares it with its source.")
    say(launch.shell())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(launch.argv[0], launch.argv, {**os.environ, **launch.environment})

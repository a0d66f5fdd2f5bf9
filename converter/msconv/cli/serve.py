"""`msconv serve`: the exact command of a serving engine, printed and run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.integrity import check_graphs
from msconv_runtime.claims import CLAIMED, is_checked_here
from msconv_runtime.serving.halves import BOOTSTRAP_PORT, MODES, Half, chosen_half
from msconv_runtime.serving.launch import plan_launch
from msconv_runtime.serving.nodes import Nodes
from msconv_runtime.serving.ports import refuse_taken
from msconv_runtime.serving.settings import REQUIRE_SIGNATURE, Settings
from msconv_runtime.serving.signed import refuse_unsigned_once
from msconv_runtime.targets import DEVICES, Target

from .command import Command
from .console import find_artifact, say
from .here import quoted, usual_device
from .options import (
    artifact_argument,
    complete_targets,
    engine_option,
    grouped,
    parted_from_flags,
    signature_option,
)
from .references import compare_layout, recipe_option, with_serve_flags
from .result import Result, json_option, show
from .typed import DEVICES_ELSEWHERE, Spelled

if TYPE_CHECKING:
    from msconv_runtime.artifact.weights import LoadMode


def _settings(
    strict_aot: bool, check_digests: bool, load: LoadMode, require_signature: Path | None, ui: bool
) -> Settings:
    key = os.environ.get(REQUIRE_SIGNATURE, "") if require_signature is None else str(require_signature.absolute())
    return Settings(strict_aot, check_digests, load, require_signature=key, ui=ui)


def _nodes(nnodes: int, node_rank: int, dist_init_addr: str | None) -> Nodes:
    return Nodes(nnodes, node_rank, dist_init_addr)


address_options = grouped(
    "address",
    lambda host, port: (host, port),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port", default=30000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on."
    ),
)
settings_options = grouped(
    "settings",
    _settings,
    click.option("--check-digests", is_flag=True, help="Compare every byte with the manifest before loading."),
    click.option(
        "--strict-aot/--no-strict-aot",
        default=True,
        show_default=True,
        help="Refuse to start if batches of other shapes would be compiled for.",
    ),
    click.option(
        "--load",
        type=click.Choice(["mmap", "read"]),
        default="mmap",
        show_default=True,
        help="Map the rank's files, or read them: some drivers hang on mapped memory.",
    ),
    signature_option,
    click.option("--ui", is_flag=True, help="Serve a chat page too, at /chat; it works offline."),
)
nodes_options = grouped(
    "nodes",
    _nodes,
    click.option(
        "--nnodes", default=1, show_default=True, type=click.IntRange(1), help="Machines that serve together."
    ),
    click.option(
        "--node-rank", default=0, show_default=True, type=click.IntRange(0), help="Which of them this is."
    ),
    click.option(
        "--dist-init-addr", metavar="HOST:PORT", help="Where the machines meet: a port of the first one."
    ),
)


half_options = grouped(
    "half",
    chosen_half,
    click.option("--disaggregation", type=click.Choice(MODES), help="Only prefill, or only decode: two servers."),
    click.option(
        "--bootstrap-port",
        type=click.IntRange(1, 65535),
        help=f"Where a prefill server tells decode servers of itself.  [default: {BOOTSTRAP_PORT}]",
    ),
)


@click.command("serve", cls=Command, context_settings={"ignore_unknown_options": False})
@artifact_argument
@recipe_option
@engine_option
@click.option(
    "--device",
    type=Spelled(list(DEVICES), DEVICES_ELSEWHERE),
    help="Where it runs.  [default: this machine's]",
)
@click.option("--target", shell_complete=complete_targets, help="Whose graphs, if there are several for an NPU.")
@address_options
@settings_options
@nodes_options
@half_options
@click.option("--print-command", is_flag=True, help="Only print the command; start nothing.")
@click.argument("sglang_args", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(
    artifact: Path | None,
    device: str | None,
    target: str | None,
    address: tuple[str, int],
    settings: Settings,
    nodes: Nodes,
    half: Half | None,
    print_command: bool,
    sglang_args: tuple[str, ...],
) -> None:
    """Serve an artifact with SGLang.

    Prints the exact command and environment and becomes that process: signals and the exit code are the server's.
    Everything after -- goes to it unchanged and wins over what msconv would say.

    \b
    msconv serve artifacts/Qwen3-0.6B-tp1 --port 30000
    msconv serve artifacts/Qwen3-0.6B-tp1 --ui
    msconv serve artifacts/Qwen3-0.6B-tp1 -- --max-total-tokens 8192 --log-level debug
    msconv serve artifacts/DeepSeek-V3-tp32-ep32 --nnodes 4 --node-rank 1 --dist-init-addr 10.0.0.1:5000
    """
    artifact, extra = parted_from_flags(artifact, sglang_args)
    root = find_artifact(artifact)
    refuse_unsigned_once(root, settings)
    opened = Artifact(root)
    compare_layout(opened.manifest)
    device = device or usual_device(opened, target, print_command)
    flags = with_serve_flags(device, extra)
    launch = plan_launch(root, device, *address, flags, settings, nodes, print_command, target, half=half)
    for flag in launch.untried:
        say(f"{flag}: nobody has tried this flag with an artifact; it is passed on.")
    for note in launch.notes:
        say(note)
    data = {"argv": launch.argv, "environment": launch.environment}
    if print_command:
        show(Result(data, launch.shell(), next=_without_print(root)))
        return
    show(Result(data))
    _warn(opened, launch.target)
    refuse_taken(*address)
    if half is not None and half.mode == "prefill":
        refuse_taken(address[0], half.bootstrap_port, "--bootstrap-port")
    say(launch.shell(hide_keys=True))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(launch.argv[0], launch.argv, {**os.environ, **launch.environment})


def _without_print(root: Path) -> str:
    """The command that was typed, without --print-command."""
    words = [word for word in sys.argv[1:] if word != "--print-command"]
    return f"{shlex.join(['msconv', *words])}  # starts it" if words else f"msconv serve {quoted(root)}"


def _warn(artifact: Artifact, target: Target) -> None:
    """Say what nobody has tried yet of an artifact's graphs for a target."""
    root, manifest = artifact.root, artifact.manifest
    proof = manifest.proof_for(target.name)
    if proof is None or check_graphs(artifact):
        say(f"Warning: {root} is UNPROVEN for {target.name}; `msconv verify {root}` compares it with its source.")
    elif not is_checked_here(manifest, proof):
        say(f"The proof for {target.name} is {CLAIMED}; `msconv verify {root}` checks it here.")
    if not target.device.has_run:
        say("Warning: nothing of msconv has run on an NPU yet; docs/ascend.md says how to report what happens.")
        if not manifest.rehearsals_for(target.name):
            say(f"`msconv rehearse {root}` tries this on a machine without NPUs.")

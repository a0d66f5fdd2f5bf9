"""`msconv doctor`: whether this machine can convert, compile, verify and serve, and what to do if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msconv_runtime.artifact import Artifact, is_artifact
from msconv_runtime.doctor import Machine, Report, examine
from msconv_runtime.errors import ArtifactError, EnvironmentProblem, UsageError
from msconv_runtime.serving.engine import chosen_engine
from msconv_runtime.targets import CPU

from .command import Command
from .console import ARTIFACTS, find_artifact, visible
from .here import quoted, serve_command
from .options import artifact_argument, engine_option
from .result import Result, json_option, show

WORDS = {"serve_cpu": "serve on a CPU", "serve_npu": "serve on an NPU"}
COLOURS = {"ok": "green", "untested": "yellow", "missing": "yellow", "wrong": "red"}


@click.command("doctor", cls=Command)
@artifact_argument
@engine_option
@json_option
def command(artifact: Path | None) -> None:
    """Say what this machine can do, what is missing, and whether ARTIFACT can be served here.

    Imports neither MindSpore nor torch.  Exit 0 if all is fine for converting (a machine without NPU is) and
    for serving ARTIFACT on the CPU, 4 if not.

    \b
    msconv doctor
    msconv doctor artifacts/Qwen3-8B-tp4
    """
    artifact = artifact and find_artifact(artifact)
    if artifact is not None and not is_artifact(artifact):
        try:
            Artifact(artifact)
        except ArtifactError as e:
            raise UsageError(e.message, e.hint) from None
    machine = Machine(output=artifact or ARTIFACTS)
    report = examine(machine, artifact, needs=chosen_engine().needs)
    failure = None
    if blockers := report.blockers:
        names = ", ".join(dict.fromkeys(f.name for f in blockers))
        failure = EnvironmentProblem(f"This is in the way: {names}.", blockers[0].hint)
    show(
        Result(
            _data(machine, report),
            verbatim=describe(report),
            failure=failure,
            next="" if failure else _next_command(artifact, report),
        )
    )


def _next_command(artifact: Path | None, report: Report) -> str:
    if artifact is None:
        return "msconv recipes  # deployments to convert for; msconv convert DIR --tp N"
    is_proven = report.artifact and report.artifact["proven"].get(CPU.name)
    return serve_command(artifact) if is_proven else f"msconv verify {quoted(artifact)}"


def _data(machine: Machine, report: Report) -> dict[str, Any]:
    return {
        "ok": not report.blockers,
        "python": machine.python,
        "findings": [
            {"name": f.name, "state": f.state, "found": f.found, "needed": f.needed, "hint": f.hint}
            for f in report.findings
        ],
        "can": report.can,
        "artifact": report.artifact,
    }


def describe(report: Report) -> str:
    """Lines, one a finding, state first; then what can be done.  What is foreign in them is visible already."""
    width = max(len(f.name) for f in report.findings)
    lines = []
    for f in report.findings:
        words = f"{f.name:{width}}  {f.found}" + (f"; needed: {f.needed}; {f.hint}" if f.state != "ok" else "")
        state = click.style(f"{f.state:8}", fg=COLOURS[f.state])
        lines.append(f"{state}  {visible(words.replace(chr(10), ' '))}")
    for ability, can in report.can.items():
        lines.append(f"{'can' if can else 'cannot':8}  {WORDS.get(ability, ability)}")
    return "\n".join(lines)

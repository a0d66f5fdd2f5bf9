"""`msconv rehearse`: the NPU server, on a machine without one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msconv_runtime.errors import VerificationFailed

from .command import Command
from .console import find_artifact, import_torch_alone, say
from .here import quoted
from .options import UserPath, artifact_argument, complete_targets, grouped, parted_from_flags, reference_option
from .report import refresh
from .result import Result, json_option, show

if TYPE_CHECKING:
    from ..rehearsal.judgement import Rehearsal
    from ..rehearsal.plan import Options

SHOWN = 20  # problems


def _options(prompts: int | None, nnodes: int, **values: Any) -> Options:
    import_torch_alone()
    from ..verify.packages import require_reference

    require_reference()
    from ..rehearsal.plan import Options

    return Options(prompts=prompts or 0, machines=nnodes, **values)


rehearsal_options = grouped(
    "options",
    _options,
    click.option(
        "--target", shell_complete=complete_targets, help="Whose graphs.  [default: the only ones for an NPU]"
    ),
    click.option("--prompts", type=click.IntRange(1), help="Ask so many prompts only.  [default: all 13]"),
    click.option(
        "--exact/--no-exact",
        default=None,
        help="Compute in float32, or in the target's own precision.  [default: exact up to 2 GiB of weights]",
    ),
    reference_option,
    click.option(
        "--nnodes",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        help="Machines: so many servers, all here.",
    ),
    click.option("--port", type=click.IntRange(1, 65535), help="Port of the server.  [default: a free one]"),
    click.option(
        "--end",
        type=click.Choice(["term", "kill"]),
        default="term",
        show_default=True,
        help="How the server ends: by SIGTERM, or because one of its ranks is killed.",
    ),
    click.option("--keep", metavar="DIR", type=UserPath(), help="Keep logs and recorded calls there."),
)


@click.command("rehearse", cls=Command)
@artifact_argument
@rehearsal_options
@click.argument("sglang_args", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(artifact: Path | None, options: Options, sglang_args: tuple[str, ...]) -> None:
    """Serve an artifact on a stand-in for the NPU, and compare all that the server does.

    Starts the real SGLang with the command of `msconv serve --device npu`; the device is a stand-in on this
    machine's CPU, and an interpreter executes the Ascend graphs.  Tokens and logits are compared with
    transformers, each call of a graph with the same call of all ranks in lockstep.  Exit 0 if all agrees, 3 if
    not.  Needs SGLang and a C++ compiler.

    \b
    msconv rehearse artifacts/Qwen3-0.6B-tp2
    msconv rehearse artifacts/Qwen3-0.6B-tp2 --target ascend310p --prompts 3
    msconv rehearse artifacts/Qwen3-0.6B-tp2 -- --dp-size 2
    """
    from ..rehearsal.rehearse import rehearse

    artifact, extra = parted_from_flags(artifact, sglang_args)
    root = find_artifact(artifact)
    try:
        result = rehearse(root, replace(options, extra=tuple(extra)), say)
    finally:
        refresh(root)
    data = summary(result)
    done = [
        f"Rehearsed for {result.target}: {data['calls']['count']} graph calls agree, and so do the "
        f"{data['answers']['tokens']} tokens that came of them, {result.seconds:.0f} s.  It has run on no device."
    ]
    show(
        Result(
            data,
            lines=[*lines(data), *done * result.ok],
            failure=None if result.ok else _failure(root, result),
            next=f"msconv serve {quoted(root)} --device npu  # on a host with NPUs",
        )
    )


def _failure(root: Path, result: Rehearsal) -> VerificationFailed:
    problems = result.problems
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return VerificationFailed(
        f"{root}: the rehearsal for {result.target} failed; problems: {len(problems)}\n"
        + "\n".join(f"  {p}" for p in problems[:SHOWN])
        + more,
        "The first one is where to begin; `--keep DIR` keeps the server's log and the recorded calls.",
    )


def summary(result: Any) -> dict[str, Any]:
    """Outcome of the rehearsal as data."""
    answers, replay = result.answers, result.replay
    return {
        "ok": result.ok,
        "target": result.target,
        "mode": "float32" if result.exact else "as served",
        "command": result.command,
        "server": {
            name: result.info.get(name)
            for name in ("device", "attention_backend", "page_size", "model_impl", "tp_size", "ep_size", "dp_size")
        },
        "requests": [
            {"name": c.name, "prompt": len(c.prompt), "answer": len(c.answer), "cached": c.cached}
            for c in result.conversations
        ],
        "answers": {
            "tokens": answers.tokens,
            "equal": answers.equal,
            "ties": answers.ties,
            "undecided": answers.undecided,
            "max_abs_logit_error": finite(answers.error),
            "kl": answers.kl,
        },
        "calls": {
            "count": replay.num_calls,
            "by_graph": replay.by_graph,
            "max_abs_logit_error": finite(replay.error),
        },
        "bound": result.bound,
        "seconds": round(result.seconds, 3),
        "start_seconds": round(result.start_s, 3),
        "end_seconds": round(result.end_s, 3),
        "problems": result.problems,
    }


def finite(error: float) -> float | None:
    """Number, or None for what JSON has none for: another shape, or not a number."""
    return error if math.isfinite(error) else None


def lines(data: dict[str, Any]) -> list[str]:
    """Lines about that data.  None if the server did not answer at all."""
    if not data["requests"]:
        return []

    def number(error: float | None) -> str:
        return "without bound" if error is None else f"{error:.2e}"

    answers, calls = data["answers"], data["calls"]
    server = ", ".join(f"{name} {value}" for name, value in data["server"].items() if value is not None)
    graphs = ", ".join(f"{count} {phase}" for phase, count in calls["by_graph"].items())
    bound = f" (bound {data['bound']:.0e})" if data["bound"] else ""
    if (kl := answers.get("kl")) is not None:
        bound = f", {kl:.1e} nats of divergence in the mean (each rounds to int8 by itself)"
    cached = sum(r["cached"] for r in data["requests"])
    left = f", {answers['ties']} ties" * bool(answers["ties"])
    left += f", {answers['undecided']} after a router's tie" * bool(answers["undecided"])
    return [
        f"  server: {server}; ready after {data['start_seconds']:.0f} s, ended after {data['end_seconds']:.0f} s",
        f"  answers: {answers['equal']} of {answers['tokens']} tokens are transformers' choice{left}; {cached} "
        f"tokens came from the cache; largest logit error {number(answers['max_abs_logit_error'])}{bound}",
        f"  graph calls: {calls['count']} ({graphs}), largest difference to the interpreter "
        f"{number(calls['max_abs_logit_error'])}",
    ]

"""What people type, and what they mean by it: commands, flags and values as other tools call them.

Only suggests: nothing that was typed is taken for something else.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import click

COMMANDS_ELSEWHERE = {
    "run": "serve",
    "start": "serve",
    "launch": "serve",
    "launch-server": "serve",
    "server": "serve",
    "chat": "serve",
    "build": "compile",
    "export": "compile",
    "shard": "convert",
    "split": "convert",
    "quantize": "convert",
    "import": "convert",
    "estimate": "plan",
    "size": "plan",
    "check": "inspect",
    "info": "inspect",
    "show": "inspect",
    "ls": "recipes",
    "list": "recipes",
    "models": "recipes",
    "test": "verify",
    "prove": "verify",
    "download": "pull",
    "upload": "push",
    "env": "doctor",
    "collect-env": "doctor",
    "simulate": "rehearse",
}
FLAGS_ELSEWHERE = {  # without dashes: what msconv calls it, the first that the command has
    "tp-size": ("--tp",),
    "tensor-parallel-size": ("--tp",),
    "tensor-model-parallel-size": ("--tp",),
    "tensor-parallel": ("--tp",),
    "world-size": ("--tp",),
    "ranks": ("--tp",),
    "ep-size": ("--ep",),
    "expert-parallel-size": ("--ep",),
    "expert-model-parallel-size": ("--ep",),
    "model-path": ("--model", "--reference"),
    "model-name": ("--model",),
    "model-name-or-path": ("--model",),
    "model-id": ("--model",),
    "checkpoint": ("--model", "--reference"),
    "input": ("--model",),
    "m": ("--model",),
    "out": ("--output",),
    "output-dir": ("--output",),
    "save-dir": ("--output",),
    "o": ("--output",),
    "precision": ("--dtype",),
    "torch-dtype": ("--dtype",),
    "data-type": ("--dtype",),
    "workers": ("--jobs",),
    "num-workers": ("--jobs",),
    "threads": ("--jobs",),
    "j": ("--jobs",),
    "soc-version": ("--target",),
    "soc": ("--target",),
    "chip": ("--target",),
    "device": ("--device", "--target"),
    "overwrite": ("--force",),
    "f": ("--force",),
    "max-model-len": ("--context",),
    "context-length": ("--context",),
    "max-seq-len": ("--context",),
    "batch-size": ("--batch",),
    "max-num-seqs": ("--batch",),
    "max-running-requests": ("--batch",),
    "hbm": ("--device-memory",),
    "memory": ("--max-memory", "--device-memory"),
    "p": ("--port",),
    "bind": ("--host",),
    "address": ("--host",),
    "hub": ("--source",),
}
DTYPES_ELSEWHERE = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"} | {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
}
DEVICES_ELSEWHERE = {"ascend": "npu", "ascend910b": "npu", "ascend910c": "npu", "ascend310p": "npu"} | {
    "910b": "npu",
    "910c": "npu",
    "310p": "npu",
    "host": "cpu",
    "gpu": "",  # neither: its letters are near to both
    "cuda": "",
}


class Mistyped(click.UsageError):
    """Wrong use, with the words that were probably meant.  `hint`: what to type."""

    def __init__(self, message: str, hint: str, ctx: click.Context | None = None) -> None:
        super().__init__(message, ctx)
        self.hint = hint


class Spelled(click.Choice[str]):
    """One of several words; `elsewhere`: how else people spell them, "" for what is none of them."""

    def __init__(self, choices: Iterable[str], elsewhere: Mapping[str, str]) -> None:
        super().__init__(list(choices))
        self.elsewhere = elsewhere

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self.choices:
            return str(value)
        typed = str(value).casefold().removeprefix("torch.").replace("-", "").replace("_", "")
        near = next(iter(difflib.get_close_matches(typed, self.choices, 1)), "")
        meant = self.elsewhere.get(typed, near)
        if not meant:
            return super().convert(value, param, ctx)
        name = param.opts[0] if param else ""
        raise Mistyped(
            f"{name} {str(value)[:40]}: one of {', '.join(self.choices)}.", f"Did you mean {name} {meant}?", ctx
        )


def near_command(typed: str, commands: Iterable[str]) -> str:
    """The command that is probably meant, "" if none is near."""
    word = typed.casefold().replace("_", "-")
    return COMMANDS_ELSEWHERE.get(word) or next(iter(difflib.get_close_matches(word, list(commands), 1)), "")


def near_flag(typed: str, flags: Sequence[str]) -> str:
    """The flag of `flags` that is probably meant, "" if none is near."""
    word = typed.partition("=")[0].casefold().replace("_", "-").lstrip("-")
    meant = [flag for flag in (*FLAGS_ELSEWHERE.get(word, ()), f"--{word}") if flag in flags]
    return next(iter(meant or difflib.get_close_matches(f"--{word}", list(flags), 1, 0.75)), "")


def refuse_flag(ctx: click.Context, error: click.NoSuchOption, given: Sequence[str]) -> NoReturn:
    """Raises Mistyped for a flag that a command has not, with what is meant.  `given`: the command's words."""
    command = ctx.command
    flags = [flag for p in command.params if isinstance(p, click.Option) for flag in (*p.opts, *p.secondary_opts)]
    typed = _as_typed(error.option_name, given)
    message = f"No such option: {typed}."
    argument = next((p for p in command.params if isinstance(p, click.Argument) and p.name == "artifact"), None)
    if argument and typed.lstrip("-").replace("_", "-") in ("artifact", "model", "model-path", "input", "path"):
        raise Mistyped(message, f"The artifact has no flag: `msconv {command.name} ARTIFACT`.", ctx) from None
    if meant := near_flag(typed, [flag for flag in flags if flag.startswith("--")]):
        raise Mistyped(message, f"Did you mean {meant}?", ctx) from None
    if any(p.name == "sglang_args" for p in command.params):
        typed_right = shlex.join(["msconv", str(command.name), *_parted(given, flags)])
        raise Mistyped(message, f"SGLang's flags come after --: `{typed_right}`.", ctx) from None
    raise error


def _as_typed(name: str, given: Sequence[str]) -> str:
    """The whole word: of `-tp` click names only `-t`."""
    if name.startswith("--"):
        return name
    return next((word for word in given if word.startswith(name) and not word.startswith("--")), name)


def _parted(given: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words with those that are not the command's own behind `--`."""
    words, behind = list(given), []
    if "--" in words:
        at = words.index("--")
        words, behind = words[:at], words[at + 1 :]
    own: list[str] = []
    moved: list[str] = []
    place = own
    for word in words:
        if word.startswith("-"):
            place = own if word.partition("=")[0] in flags else moved
        elif place is moved and (not moved or not moved[-1].startswith("-") or "=" in moved[-1]):
            place = own
        place.append(word)
    return [*own, "--", *moved, *behind]

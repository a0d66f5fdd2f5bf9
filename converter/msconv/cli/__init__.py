"""The command line.  One file a command: parse, call, show its Result.  Data on stdout, all else on stderr."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from .. import __version__

COMMANDS = {
    "convert": "Convert a checkpoint: reshard it for tensor and expert parallelism into an artifact.",
    "plan": "Say what a conversion would cost, and what the model needs on a device.",
    "lint": "Say what is wrong with a checkpoint: names, numbers, scales and digests.",
    "compile": "Compile an artifact's static graphs, ahead of time, for one or more targets.",
    "verify": "Prove an artifact numerically against the source checkpoint.",
    "rehearse": "Serve an artifact on a stand-in for the NPU, and compare all that the server does.",
    "serve": "Serve an artifact with SGLang.",
    "reshard": "Write an artifact for another number of ranks, without the source checkpoint.",
    "inspect": "Show what an artifact holds; --check reads every byte.",
    "sign": "Sign an artifact as it is, into model.sig: after all that changes it.",
    "report": "Write report.html: proof, memory, coverage and graphs on one page that works offline.",
    "push": "Upload an artifact to a repository of a Hugging Face hub, with a card that says what it is.",
    "pull": "Download an artifact from a repository of a Hugging Face hub: owner/name[@revision].",
    "doctor": "Say what this machine can do, what is missing, and whether an artifact can be served here.",
    "recipes": "List recipes, or show one and its commands.",
    "completion": "Print the script that completes commands, options and names in a shell.",
}


class _Lazy(click.Group):
    """Group that imports a command's module when it is asked for: `msconv --help` stays quick.

    `msconv` alone is `msconv --help`, and so is `msconv help`; `msconv help COMMAND` and `msconv version` as well.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((i for i, word in enumerate(args) if not word.startswith("-")), len(args))
        if not args:
            args = ["--help"]
        elif args[first:][:1] == ["help"]:
            args = [*args[:first], *args[first + 1 :][:1], "--help"]
        elif args[first:][:1] == ["version"]:
            args = ["--version"]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in COMMANDS or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        from .typed import Mistyped, near_command

        near = near_command(args[0], (*COMMANDS, "help", "version"))
        hint = f"Did you mean `msconv {near}`?" if near else "`msconv help` lists the commands."
        raise Mistyped(f"No such command: {args[0][:80]}.", hint, ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"{__name__}.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Lazy,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "color": False if os.environ.get("NO_COLOR") else None,
    },
)
@click.version_option(__version__, prog_name="msconv")
@click.option("--quiet", "-q", is_flag=True, envvar="MSCONV_QUIET", help="Only errors, and what goes to stdout.")
@click.option(
    *("--verbose", "-v"),
    is_flag=True,
    envvar="MSCONV_VERBOSE",
    help="Also versions, times, every value and where it came from.",
)
def cli(quiet: bool, verbose: bool) -> None:
    """From a Hugging Face checkpoint to a server on Ascend NPUs.

    \b
    msconv convert --model Qwen3-8B --tp 4     weights per rank, into artifacts/
    msconv compile --target ascend910b         static graphs, on any machine
    msconv verify --target ascend910b          proven against transformers
    msconv serve --device npu                  SGLang on the artifact, on a host with NPUs

    Without --target and --device the last three are for what the artifact has graphs for, or else for this
    machine's device; they say which.

    Flags come before the environment, that before a recipe, that before defaults.  MSCONV_CONVERT_TP=4 is
    `msconv convert --tp 4`, and so for every option; MSCONV_RECIPES is a directory of your own recipes.
    """
    from .console import Volume, hear_warnings, set_volume

    hear_warnings()
    set_volume(Volume.NORMAL)
    if quiet:
        set_volume(Volume.QUIET)
    if verbose:
        set_volume(Volume.VERBOSE)


def main() -> None:
    """Run the command line and leave with its exit code."""
    from .result import report

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else it is for nohup to say
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        code = cli.main(prog_name="msconv", standalone_mode=False) or 0
    except click.exceptions.Exit as e:
        code = e.exit_code
    except SystemExit as e:  # click's answer to a reader that went away
        code = e.code if isinstance(e.code, int) else 1
    except BaseException as e:
        _ignore_signals()  # another one would interrupt what is said about the first
        code = report(e)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads any more, or there is no room for the answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    _ignore_signals()  # all is done and said
    sys.exit(code)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt

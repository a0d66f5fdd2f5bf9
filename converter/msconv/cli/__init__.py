"""The command line.  One file a command: parse, call, print.  Data on stdout, everything else on stderr."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from .. import __version__

COMMANDS = {
    "convert": "Convert a checkpoint: reshard it for tensor parallelism into an artifact.",
    "plan": "Say what a conversion would cost, and what the model needs on a device.",
    "compile": "Compile an artifact's static graphs, ahead of time, for one or more targets.",
    "verify": "Prove an artifact numerically against the source checkpoint.",
    "serve": "Serve an artifact with SGLang.",
    "reshard": "Write an artifact for another number of ranks, without the source checkpoint.",
    "inspect": "Show what an artifact holds; --check reads every byte.",
    "doctor": "Say what this machine can do, what is missing, and whether an artifact can be served here.",
}


class _Lazy(click.Group):
    """Imports a command's module when it is asked for: `msconv --help` stays quick."""

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


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="msconv")
def cli() -> None:
    """From a Hugging Face checkpoint to a server on Ascend NPUs.

    \b
    msconv convert --model Qwen3-8B --tp 4     weights per rank, into artifacts/
    msconv compile --target ascend910b         static graphs, on any machine
    msconv verify                              proven against transformers
    msconv serve                               SGLang on the artifact
    """


def main() -> None:
    """Run the command line and leave with its exit code."""
    from .console import report

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, _interrupt)
    try:
        code = cli.main(standalone_mode=False) or 0
    except click.exceptions.Exit as e:
        code = e.exit_code
    except SystemExit as e:  # click's answer to a reader that went away
        code = e.code if isinstance(e.code, int) else 1
    except BaseException as e:
        code = report(e, as_json="--json" in sys.argv)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads any more, or there is no room for the answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # all is done and said
    sys.exit(code)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt

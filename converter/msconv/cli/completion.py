"""`msconv completion`: click's own completion, as a script for a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .command import Command
from .result import Result, json_option, show

INSTALL = {
    "bash": "msconv completion bash > ~/.local/share/bash-completion/completions/msconv",
    "zsh": "msconv completion zsh > a file `_msconv` in a directory of your $fpath",
    "fish": "msconv completion fish > ~/.config/fish/completions/msconv.fish",
}


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(list(INSTALL)))
@json_option
def command(shell: str) -> None:
    """Print the script that completes commands, options and names in a shell.

    Artifacts in artifacts/ and recipes are completed too.

    \b
    eval "$(msconv completion bash)"                          now, in this shell
    msconv completion zsh > ~/.zfunc/_msconv                  for good; ~/.zfunc is in $fpath
    msconv completion fish > ~/.config/fish/completions/msconv.fish
    """
    from . import cli

    shell_class = get_completion_class(shell)
    assert shell_class
    script = shell_class(cli, {}, "msconv", "_MSCONV_COMPLETE").source()
    show(Result({"shell": shell, "script": script}, verbatim=script, next=INSTALL[shell]))

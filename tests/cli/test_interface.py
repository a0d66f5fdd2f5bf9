"""The interface is frozen: what changes here changes for people and scripts, and is to be meant."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from msconv.cli import COMMANDS, cli
from tests.checkpoints import edit_json
from tests.cli.interface import fields, flags
from tests.conftest import Checkpoints
from tests.warm import run_warm

HERE = Path(__file__).parent
FLAGS = HERE / "interface.txt"  # python -m tests.cli.interface > tests/cli/interface.txt
FIELDS = HERE / "fields.txt"


def frozen_fields() -> dict[str, set[str]]:
    """By command, as `fields.txt` has them: a line `msconv ...`, then a field a line."""
    sections = FIELDS.read_text().strip().split("\n\n")
    return {s.splitlines()[0]: {line.strip() for line in s.splitlines()[1:]} for s in sections}


def test_commands_flags_and_variables_are_those_that_are_written_down() -> None:
    assert flags() == FLAGS.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_examples_and_the_flags_of_all(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command
    assert command.help
    examples = re.findall(rf"^ *(?:eval \"\$\()?msconv {name}\b", command.help, re.MULTILINE)
    assert examples, "no example"
    said = {flag for param in command.params for flag in param.opts}
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= said
    assert all(p.help for p in command.params if isinstance(p, click.Option))
    assert command.help.splitlines()[0].replace("ARTIFACT", "an artifact") == COMMANDS[name]


def test_every_command_has_its_fields_written_down() -> None:
    assert {key.split()[1] for key in frozen_fields() if key != "error"} == set(COMMANDS)


def check(key: str, *args: object, code: int = 0) -> None:
    done = run_warm(*args, "--json")
    assert done.code == code, done.stderr
    assert sorted(fields(done.json)) == sorted(frozen_fields()[key])


def test_fields_of_what_is_planned_and_converted(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("untied")
    options = ("--model", model, "--tp", 2, "--output", tmp_path / "out")
    check("msconv plan", "plan", *options, "--device-memory", "1G")
    check("msconv convert --dry-run", "convert", *options, "--dry-run")
    check("msconv convert", "convert", *options)
    check("msconv reshard", "reshard", tmp_path / "out", "--tp", 1, "--output", tmp_path / "one")
    check("error", "convert", *options[:2], code=2)


def test_fields_of_what_is_linted(own_checkpoint: Checkpoints) -> None:
    model = own_checkpoint("untied")
    edit_json(model / "config.json", num_hidden_layers=3)
    check("msconv lint", "lint", model, code=1)


def test_fields_of_what_is_shown() -> None:
    check("msconv recipes", "recipes")
    check("msconv recipes NAME", "recipes", "Qwen3-8B")
    check("msconv completion", "completion", "bash")
    check("msconv doctor", "doctor")


@pytest.mark.slow
def test_fields_of_an_artifact(own_artifact: Path) -> None:
    check("msconv inspect", "inspect", own_artifact)
    check("msconv inspect --check", "inspect", own_artifact, "--check")
    check("msconv doctor ARTIFACT", "doctor", own_artifact)
    check("msconv serve", "serve", own_artifact, "--print-command")
    check("msconv compile", "compile", own_artifact)
    check("msconv report", "report", own_artifact)
    check("msconv verify", "verify", own_artifact)

"""How a command answers: an object or text, then lines, then the exit code or what to do next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from click.testing import Result as Done

from msconv.cli.command import Command
from msconv.cli.options import grouped
from msconv.cli.result import Result, json_option, show
from msconv.cli.verify import _proven
from msconv.verify.comparison import Comparison
from msconv.verify.result import Proof
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.units import human_bytes
from tests.commands import run_msconv

NO = VerificationFailed("It is not so.", "Look again.")


def answer(result: Result, *args: str) -> Done:
    """What a command with this result prints."""

    @click.command("answer", cls=Command)
    @json_option
    def command() -> None:
        show(result)

    return CliRunner().invoke(command, args)


def test_people_get_text_and_programs_get_data_and_both_get_lines() -> None:
    result = Result({"a": 1}, "one\ntwo", lines=["a line"], next="msconv rest")
    done = answer(result)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "one\ntwo\n", "a line\nNext: msconv rest\n")
    done = answer(result, "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"a": 1})
    assert done.stderr == "a line\nNext: msconv rest\n"


def test_data_that_takes_work_is_made_for_programs_only() -> None:
    made: list[int] = []

    def data() -> dict[str, Any]:
        made.append(1)
        return {"made": len(made)}

    assert answer(Result(data)).stdout == ""
    assert made == []
    assert json.loads(answer(Result(data), "--json").stdout) == {"made": 1}


def test_a_no_is_an_error_for_people_and_an_exit_code_for_programs() -> None:
    result = Result({"ok": False}, "text", lines=["a line"], failure=NO, next="never said")
    done = answer(result)
    assert (done.exception, done.stdout, done.stderr) == (NO, "text\n", "a line\n")
    done = answer(result, "--json")
    assert (done.exit_code, json.loads(done.stdout), done.stderr) == (NO.exit_code, {"ok": False}, "a line\n")


def test_what_programs_get_is_json_whatever_the_numbers_are() -> None:
    infinite = float("inf")
    done = answer(Result({"error": infinite, "norms": {"a": [-infinite, float("nan"), 1.5]}}), "--json")
    assert json.loads(done.stdout) == {"error": None, "norms": {"a": [None, None, 1.5]}}


def test_names_cannot_steer_a_terminal_unless_their_maker_says_that_they_do_not() -> None:
    assert answer(Result({}, "a\x1b[1mb")).stdout == "a\\x1b[1mb\n"
    assert answer(Result({}, verbatim="if x\tthen")).stdout == "if x\tthen\n"


def test_a_page_that_cannot_be_written_is_one_object(own_artifact: Path, tmp_path: Path) -> None:
    done = run_msconv("report", own_artifact, "--output", tmp_path / "none/page.html", "--json")
    assert done.code == 2
    assert set(done.json) == {"error"}


def test_options_of_a_group_come_as_one_value_and_keep_their_place() -> None:
    options = (click.option("--b", type=int), click.option("--c", "--long", "other", default=3))

    @click.command("grouped", cls=Command)
    @click.option("--a", type=int)
    @grouped("pair", lambda b, other: (b, other), *options)
    @click.option("--d", is_flag=True)
    def command(a: int, pair: tuple[int, int], d: bool) -> None:
        """Help."""
        click.echo(f"{a} {pair} {d}")

    assert [p.name for p in command.params][:4] == ["a", "b", "other", "d"]
    assert command.help == "Help."
    assert CliRunner().invoke(command, ["--b", "2", "--a", "1", "--d"]).stdout == "1 (2, 3) True\n"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1.5 * (1 << 30), "1.50 GiB"),
        ((1 << 40) - 1, "1024.00 GiB"),
        (1 << 40, "1.00 TiB"),
        (1 << 51, "2048.00 TiB"),
    ],
)
def test_bytes_are_said_in_the_largest_unit_that_fits(size: float, words: str) -> None:
    assert human_bytes(size) == words


def test_a_unit_and_a_space_can_be_given() -> None:
    assert human_bytes(1 << 20, "GiB") == "0.00 GiB"
    assert human_bytes(5 << 40, "GiB", space="\u00a0") == "5120.00\u00a0GiB"


@pytest.mark.parametrize(("size", "rate"), [(4 << 20, ""), (1_192_099_840, " (77.1 s per GB of weights)")])
def test_a_proof_is_told_as_the_front_page_shows_it(size: int, rate: str) -> None:
    """With a rate only where the weights take the time: of 4 MiB it would be hours a GB."""
    found = Comparison(1e-4, max_abs_logit_error=8.7e-6, agreeing=558, decided=558)
    *_, last = _proven(Proof("cpu", 1, found, [], [], 91.9, weights_bytes=size))
    front = (Path(__file__).parents[2] / "README.md").read_text()
    assert last.removesuffix(rate) in front and last.endswith(f"91.9 s{rate}")

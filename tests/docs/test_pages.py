"""The documentation is that of this program: commands parse, links lead somewhere, messages are raised."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import click
import pytest

from msconv.cli import cli
from msconv_runtime.errors import MsconvError
from tests.commands import run_msconv
from tests.docs.pages import PAGES, ROOT, anchors, commands, headings, links, mentions

ELLIPSIS = "…"  # in a message: what differs from case to case


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


def shown(find: Callable[[str], list[str]]) -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in dict.fromkeys(find(page.read_text()))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with what the pages call a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-dots1", "tiny-hop", "tiny-qwen3", "tiny-int8", "DIR", "REF"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(("page", "line"), shown(commands))
def test_every_command_that_is_shown_parses(page: str, line: str, here: None) -> None:
    if "[OPTIONS]" not in line:
        parse(page, line)


@pytest.mark.parametrize(("page", "line"), shown(mentions))
def test_every_command_that_is_mentioned_parses(page: str, line: str, here: None) -> None:
    with contextlib.suppress(click.MissingParameter):
        parse(page, line)


def parse(page: str, line: str) -> None:
    words = shlex.split(example(line), comments=True)
    if words[1] in ("help", "version"):  # words for --help and --version
        return
    command = cli.get_command(click.Context(cli), words[1])
    assert command, f"{page}: no command {words[1]}"
    try:
        command.make_context(words[1], words[2:])
    except click.MissingParameter:
        raise
    except (click.UsageError, MsconvError) as e:
        pytest.fail(f"{page}: {line}: {e}")


def example(line: str) -> str:
    """What is typed: without the words beside it (two spaces or more away), what goes elsewhere, and choices."""
    line = re.split(r"\s{2,}|\s>\s|\s\|\s", line)[0]
    return re.sub(r"\bN\b", "1", re.sub(r"\bSIZE\b", "1G", line))


def test_the_parser_of_this_test_sees_what_is_wrong() -> None:
    command = cli.get_command(click.Context(cli), "plan")
    assert command
    for wrong in (["--no-such"], ["--tp", "many"], ["--model"]):
        with pytest.raises(click.UsageError):
            command.make_context("plan", ["--model", "models/Qwen3-8B", "--tp", "1", *wrong])


def test_the_command_reference_is_what_the_program_says() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "docs.generate"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert (ROOT / "docs" / "commands.md").read_text() == made.stdout, (
        "docs/commands.md is out of date: python -m docs.generate > docs/commands.md"
    )


def test_every_error_has_its_code_in_the_table_of_exit_codes() -> None:
    """Found in the sources: some modules can only be imported where an engine is."""
    paths = [p for package in ("converter", "runtime") for p in (ROOT / package).rglob("*.py")]
    classes = [n for p in paths for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ClassDef)]
    errors: dict[str, ast.ClassDef | None] = {"MsconvError": None}
    before = 0
    while before < len(errors):  # until no class of an error is new
        before = len(errors)
        errors |= {c.name: c for c in classes if any(ast.unparse(b).split(".")[-1] in errors for b in c.bases)}
    codes = {
        ast.literal_eval(line.value)
        for c in errors.values()
        for line in (c.body if c else ())
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "code"
    }
    assert {"artifact", "hub", "store", "recipe"} <= codes
    table = (ROOT / "docs" / "commands.md").read_text().split("## Exit codes")[1]
    assert codes - set(re.findall(r"^\| \d+ \| `(\w+)` \|", table, re.M)) == set()


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links((ROOT / "README.md").read_text())}
    assert [page.name for page in PAGES if page not in linked and page.name != "README.md"] == []


def test_the_chinese_front_page_says_what_the_english_one_says() -> None:
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    assert headings(english) == headings(chinese)

    def typed(text: str) -> list[str]:
        return [example(line) for line in commands(text)]

    assert len(typed(english)) > 6
    assert typed(english) == typed(chinese)
    assert mentions(english) == mentions(chinese)
    table = re.compile(r"^\| `(msconv .+?)` \|", re.M)
    assert table.findall(english) == table.findall(chinese)
    assert len(table.findall(english)) == 5
    there = {"README.md", "README.zh.md"}
    assert [link for link in links(english) if link not in there] == [
        link for link in links(chinese) if link not in there
    ]
    figures = re.compile(r"\d[\d,.]*\d")
    assert sorted(figures.findall(english)) == sorted(figures.findall(chinese))


CHEAP = ("msconv recipes", "msconv plan DeepSeek-R1", "msconv recipes DeepSeek-R1", "msconv plan Qwen3-8B")


def test_what_is_cheap_of_what_is_shown_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # recipes are planned without a network
    lines = {example(line) for _, line in shown(commands) + shown(mentions)}
    assert set(CHEAP) <= lines
    for line in [*CHEAP, "msconv help", "msconv doctor", "msconv version"]:
        if "R1" in line and "plan" in line:
            continue  # 32 ranks of 256 experts take a while
        done = run_msconv(*shlex.split(line)[1:], cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert done.stdout


def test_every_page_says_first_who_it_is_for() -> None:
    """But for those about adding something, whose titles say it."""
    pages = [page for page in (ROOT / "docs").glob("*.md") if not page.name.startswith("adding-")]
    assert len(pages) > 15
    for page in pages:
        assert page.read_text().split("\n\n")[1].startswith("For "), page.name


def test_the_glossary_has_each_word_once_and_in_order() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    words = [word.casefold() for word, _, _ in rows if word != "word"]
    assert len(words) > 40
    assert words == sorted(set(words))


@cache
def raised() -> list[str]:
    """The constant text of each string in the packages, with an ellipsis for what is put in."""
    texts = []
    for package in ("converter", "runtime"):
        for path in sorted((ROOT / package).rglob("*.py")):
            texts += [_text(node) for node in ast.walk(ast.parse(path.read_text())) if _is_text(node)]
    return texts


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(v) for v in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ELLIPSIS


def messages(page: str) -> list[str]:
    """The messages of msconv's own that the troubleshooting of a page is sorted by."""
    own = page.split("## What msconv says")[1].split("\n## ")[0]
    return re.findall(r"^\*\*`(.+?)`\*\*", own, re.M)


def own_messages() -> list[str]:
    return messages((ROOT / "docs" / "ascend.md").read_text())


@pytest.mark.parametrize("message", own_messages())
def test_every_message_in_troubleshooting_is_one_that_is_raised(message: str) -> None:
    pieces = [piece for piece in message.split(ELLIPSIS) if piece]
    pattern = re.compile(".*?".join(map(re.escape, pieces)), re.S)
    assert any(pattern.search(text) for text in raised()), message


def test_there_are_messages_to_look_for() -> None:
    assert len(own_messages()) > 10

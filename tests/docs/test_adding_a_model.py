"""docs/adding-a-model.md, followed to the letter in a copy of the packages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "adding-a-model.md"
FILE = re.compile(r"(?:[Ww]rite|[Ss]ave as) `([\w./-]+)`(?: and run it)?:$")


@pytest.mark.slow
def test_the_page_adds_a_family_that_is_proven(tmp_path: Path) -> None:
    for package in ("converter", "runtime"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    ran: list[str] = []
    for block in blocks(PAGE.read_text()):
        if block.language == "python":
            named = FILE.search(block.before)
            assert named, f"no file is named before:\n{block.text}"
            path = tmp_path / named[1]
            assert not path.exists(), f"{named[1]} is there already"
            path.write_text(block.text)
        elif block.language == "sh":
            for line in block.text.splitlines():
                run(line, tmp_path)
                ran.append(line)
    assert sum(line.startswith("msconv verify") for line in ran) == 2
    assert ran[-1] == "python generate.py"


def run(line: str, directory: Path) -> None:
    """A line of the page, with this Python and the copied packages.  It must succeed."""
    program, *arguments = shlex.split(line)
    command = {"python": [sys.executable], "msconv": [sys.executable, "-m", "msconv"]}[program]
    environment = {**os.environ, "PYTHONPATH": f"{directory / 'converter'}:{directory / 'runtime'}"}
    done = subprocess.run(
        [*command, *arguments], cwd=directory, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_the_family_on_the_page_is_not_one_already() -> None:
    """The page shows what is missing; once the family is there for good, it must take another."""
    assert not (ROOT / "converter/msconv/families/dots1.py").exists()

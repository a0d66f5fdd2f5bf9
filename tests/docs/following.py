"""Following a page of the documentation to the letter, in a copy of the packages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT, blocks

FILE = re.compile(r"(?:[Ww]rite|[Ss]ave as) `([\w./-]+)`(?: and run it)?:$")


def follow(page: Path, directory: Path) -> list[str]:
    """Write the page's files and run its commands, in order.  Each must succeed.  Returns the commands."""
    for package in ("converter", "runtime"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    ran: list[str] = []
    for block in blocks(page.read_text()):
        if block.language == "python":
            named = FILE.search(block.before)
            assert named, f"no file is named before:\n{block.text}"
            path = directory / named[1]
            assert not path.exists(), f"{named[1]} is there already"
            path.write_text(block.text)
        elif block.language == "sh":
            for line in block.text.splitlines():
                run(line, directory)
                ran.append(line)
    return ran


def run(line: str, directory: Path) -> None:
    """A line of the page, with this Python and the copied packages.  It must succeed."""
    program, *arguments = shlex.split(line)
    command = {"python": [sys.executable], "msconv": [sys.executable, "-m", "msconv"]}[program]
    environment = {**os.environ, "PYTHONPATH": f"{directory / 'converter'}:{directory / 'runtime'}"}
    done = subprocess.run(
        [*command, *arguments], cwd=directory, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def written(page: Path, name: str) -> str:
    """The text that the page gives the file of this name."""
    found = [b.text for b in blocks(page.read_text()) if (m := FILE.search(b.before)) and m[1] == name]
    assert len(found) == 1, f"{name} is written {len(found)} times"
    return found[0]

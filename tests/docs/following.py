"""A page that adds something to the packages, followed to the letter in a copy of them."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
from pathlib import Path

from tests.docs.pages import ROOT, blocks
from tests.warm import NUMPY, first

FILE = re.compile(r"(?:[Ww]rite|[Ss]ave as) `([\w./-]+)`(?: and run it)?:$")
EDIT = re.compile(r"[Ii]n `([\w./-]+)`, this line becomes the (?:one|ones) below it:$")
VARIABLE = re.compile(r"[A-Z_]+=")
PROGRAMS = {"python": [], "msconv": ["msconv"]}  # what stands before the arguments


def follow(page: Path, directory: Path) -> tuple[list[str], list[str], list[str]]:
    """Do what a page says.  Gives the files that it wrote in the packages, those that it edited there, and what it
    ran: each line must succeed."""
    for package in ("converter", "runtime"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    written, edited, ran = [], [], []
    for block in blocks(page.read_text()):
        if named := EDIT.search(block.before):
            _edit(directory / named[1], block.text)
            edited.append(named[1])
        elif block.language == "python":
            named = FILE.search(block.before)
            assert named, f"no file is named before:\n{block.text}"
            path = directory / named[1]
            assert not path.exists(), f"{named[1]} is there already"
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
            if "/" in named[1]:
                written.append(named[1])
        elif block.language == "sh":
            for line in block.text.splitlines():
                run(line, directory)
                ran.append(line)
    return written, edited, ran


def _edit(path: Path, text: str) -> None:
    """The block's first line is in the file, once; the others come in its place."""
    old, _, new = text.partition("\n")
    lines = path.read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.strip() == old.strip()]
    assert len(places) == 1, f"{path.name}: {old} is there {len(places)} times"
    indent = lines[places[0]][: len(lines[places[0]]) - len(lines[places[0]].lstrip())]
    lines[places[0] : places[0] + 1] = [indent + line for line in new.splitlines()]
    path.write_text("\n".join(lines) + "\n")


def run(line: str, directory: Path) -> None:
    """A line of a page, with this Python and the copied packages.  It must succeed."""
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in itertools.takewhile(VARIABLE.match, words))
    program, *arguments = words[len(variables) :]
    path = f"{directory / 'converter'}:{directory / 'runtime'}"
    environment = {**NUMPY, **os.environ, "PYTHONPATH": path, **variables}
    done = first().run([*PROGRAMS[program], *arguments], directory, environment, 300)
    assert done.code == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def text_of(page: Path, name: str) -> str:
    """What a page writes into the file of this name."""
    found = [b.text for b in blocks(page.read_text()) if (m := FILE.search(b.before)) and m[1] == name]
    assert len(found) == 1, f"{name} is written {len(found)} times"
    return found[0]

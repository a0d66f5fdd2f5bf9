"""The image files in docker/: what they copy is there and is sent to the build; linted by hadolint."""

from __future__ import annotations

import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.install.environments import HERE, ROOT, environment

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
UNPINNED = "--ignore=DL3008 --ignore=DL3013"  # versions of Debian's packages, and of those that the wheel asks for
FOREIGN_USER = "--ignore=DL3066"  # a name and no number: the container is run by itself


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its words) of each; lines that end in a backslash are joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, words.strip()) for name, _, words in found]


def is_sent(name: str) -> bool:
    """Whether .dockerignore lets a path of this directory into the build: the last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.lstrip("!")
        if fnmatch(name, pattern) or name.startswith(f"{pattern}/"):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_an_image_copies_only_what_is_there_and_sent(path: Path) -> None:
    found = instructions(path)
    assert {name for name, _ in found} <= KNOWN
    assert next(name for name, _ in found if name != "ARG") == "FROM"
    sources = [s for name, words in found if name == "COPY" for s in shlex.split(words)[:-1]]
    assert {"pyproject.toml", "converter", "runtime", "recipes"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source
    assert not is_sent("artifacts/README.md") and not is_sent(".git/config")


def test_both_images_say_that_they_are_untried() -> None:
    assert [p.name for p in FILES] == ["Dockerfile.ascend", "Dockerfile.cpu"]
    for path in FILES:
        assert "untried" in path.read_text().lower()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MSCONV_INSTALL"), reason="downloads hadolint: `make test-install`")
def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    with environment(tmp_path / "env") as env:
        env.install("-r", HERE / "hadolint.txt")
        done = env.run("hadolint", *UNPINNED.split(), FOREIGN_USER, *FILES)
        assert done.returncode == 0, done.stdout
        bad = tmp_path / "Dockerfile.bad"
        bad.write_text("FROM python\nRUN cd /tmp\n")
        assert env.run("hadolint", bad).returncode == 1

"""requirements/*.txt: every package has a version and the hashes of its files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[1] / "requirements"
FILES = sorted(HERE.glob("*.txt"))


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hashes", HERE / "hashes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_package_has_a_version_and_hashes(path: Path) -> None:
    text = path.read_text()
    found = program().pins(text)
    assert found and [pin for pin, hashes in found.items() if not hashes] == [], "`make hashes` writes them"
    packages = [line for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    assert len(packages) == len(found), "a package without a version, or one that is there twice"


def test_torch_is_a_build_for_a_cpu_wherever_it_is_installed() -> None:
    """The public index has builds for CUDA under the same version, which do not import without its libraries."""
    named = {path.name: re.findall(r"^torch==(\S+)", path.read_text(), re.M) for path in FILES}
    assert {name: versions for name, versions in named.items() if versions} == {"torch.txt": ["2.13.0+cpu"]}
    for name in ("cpu.txt", "eval.txt"):
        assert "\n-r torch.txt\n" in (HERE / name).read_text()


def uv(directory: Path, *lines: str) -> str:
    """A program that answers like uv."""
    path = directory / "uv"
    path.write_text("#!/bin/sh\ncat > asked\ncat <<'E'\n" + "\n".join(lines) + "\nE\n")
    path.chmod(0o755)
    return str(path)


def test_hashes_take_the_place_of_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"# Why.\n-r torch.txt\nTwo_Words==1.1 \\\n    --hash=sha256:{'0' * 64}\nb==2\n"
    said = [rf"b==2 \ --hash=sha256:{'b' * 64}", rf"two-words==1.1 \ --hash=sha256:{'a' * 64}"]
    found = program().hashed(text, uv(tmp_path, *said))
    two_words = f"Two_Words==1.1 \\\n    --hash=sha256:{'a' * 64}\n"
    b = f"b==2 \\\n    --hash=sha256:{'b' * 64}\n"
    assert found == f"# Why.\n-r torch.txt\n{two_words}{b}"
    assert (tmp_path / "asked").read_text() == "Two_Words==1.1\nb==2"


def test_a_version_without_hashes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^b==3: the index has no hash of it"):
        program().hashed("b==3\n", uv(tmp_path, "b==3"))

"""Environments of the tests' own: made in a temporary directory, given packages and the wheel, and removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PIP = ("-m", "pip", "--disable-pip-version-check")
WHEEL = (*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation")

NOT_IN_THE_BASE = {  # by package: the extra that has it, or what else brings it
    "mindspore": "compile",
    "google": "compile",
    "numba": "fast",
    "torch": "verify",
    "transformers": "verify",
    "safetensors": "verify",
    "cryptography": "sign",
    "model_signing": "sign",
    "OpenSSL": "sign",
    "fsspec": "storage",
    "onnx": "onnx",
    "sglang": "installed apart",
    "vllm": "installed apart",
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    root: Path

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A program of this environment, with nothing of the one that the tests run in."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        program, *rest = map(str, command)
        return subprocess.run(
            [str(self.bin / program), *rest], cwd=cwd or self.root, env=kept, capture_output=True, text=True
        )

    def install(self, *what: str | Path) -> None:
        done = self.run("python", *PIP, "install", "--quiet", "--progress-bar", "off", *what)
        assert done.returncode == 0, done.stderr[-3000:]

    def packages(self) -> dict[str, str]:
        """Versions by name."""
        done = self.run("python", *PIP, "list", "--format", "json")
        return {p["name"].lower(): p["version"] for p in json.loads(done.stdout)}

    def conflicts(self) -> list[str]:
        """What pip finds of requirements that are not met."""
        done = self.run("python", *PIP, "check")
        return [] if done.returncode == 0 else done.stdout.splitlines()

    def json(self, program: str) -> dict[str, Any]:
        """What a program of this directory prints last, as JSON."""
        done = self.run("python", HERE / program)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: on the path, or one of pyenv's."""
    others = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    for found in (shutil.which(f"python{version}"), *map(str, others)):
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


@contextmanager
def environment(directory: Path, python: str = sys.executable) -> Iterator[Environment]:
    """An empty one, until the block ends.  The machine has little disk: they are not kept."""
    subprocess.run([python, "-m", "venv", directory], check=True)
    try:
        yield Environment(directory)
    finally:
        shutil.rmtree(directory)


def build_wheel(directory: Path) -> Path:
    """The wheel of this source tree, built from a copy: a build leaves files beside the sources."""
    source = directory / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("converter", "runtime", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, *WHEEL, "-w", directory, source]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = directory.glob("*.whl")
    return wheel

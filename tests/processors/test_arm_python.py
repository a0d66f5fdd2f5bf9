"""`msconv convert` on an aarch64 Python, by QEMU.  A `Session` needs MindSpore: PyPI has none for aarch64."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Checkpoints
from tests.conversions import convert

HERE = Path(__file__).parents[2]
PYTHON = HERE / ".venv-aarch64" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (os.environ.get("MSCONV_PROCESSORS") and PYTHON.exists()), reason="`make test-processors` makes it"
    ),
]


def files(root: Path) -> dict[str, bytes]:
    """All that is served: not the page for people, nor the conversion's own bookkeeping."""
    found = (
        p for p in sorted(root.rglob("*")) if p.is_file() and ".msconv" not in p.parts and p.suffix != ".html"
    )
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


def on_aarch64(*arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{HERE / 'converter'}:{HERE / 'runtime'}"}
    command = [str(PYTHON), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_convert_writes_the_same_bytes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = checkpoint("bfloat16_shards")
    assert on_aarch64("-c", "import platform; print(platform.machine())") == "aarch64\n"
    on_aarch64("-m", "msconv", "convert", "--model", source, "--output", tmp_path / "there", "--tp", 2)
    convert(source, tmp_path / "here", tp=2)
    here = files(tmp_path / "here")
    assert any(name.endswith(".safetensors") for name in here)
    assert files(tmp_path / "there") == here

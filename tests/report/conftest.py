"""A real artifact with experts on two ranks, made by the commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.moe_checkpoints import make_qwen3_moe
from tests.warm import run_warm


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{what was done last: a copy of the artifact as it was then}.  To be read, never changed."""
    root = tmp_path_factory.mktemp("report")
    model = make_qwen3_moe(root / "Qwen3-MoE", dtype="bfloat16")
    artifact = root / "artifact"
    found = {}
    for name, command in {
        "convert": ("convert", "--model", model, "--tp", 2, "--ep", 2, "--output", artifact),
        "compile": ("compile", artifact, "--target", "cpu", "--target", "ascend910b"),
        "verify": ("verify", artifact, "--target", "cpu"),
        "verify all": ("verify", artifact, "--target", "ascend910b"),
    }.items():
        done = run_warm(*command)
        assert done.code == 0, done.stderr
        assert "Warning" not in done.stderr
        found[name] = Path(shutil.copytree(artifact, root / name))
    return found


@pytest.fixture(scope="session")
def proven(stages: dict[str, Path]) -> Path:
    """Converted, compiled and verified, for the CPU and for 910B."""
    return stages["verify all"]

"""MindSpore 2.8.0 beside the version of the main environment: each exports, each loads the other's graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Checkpoints

OTHER = Path(__file__).parents[2] / ".venv-ms28" / "bin" / "python"
RUN = """
import sys
import numpy as np
from msconv_runtime import Session
session = Session(sys.argv[1])
prefill = session.prefill([[1, 2, 3, 4, 5], [7, 8]])
np.savez(sys.argv[2], prefill=prefill, decode=session.decode([9, 10]), extend=session.extend([[4, 5, 6], [1]]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER.exists(), reason="needs the second environment: `make test-ms28` makes it"),
]


def run(*command: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def logits(python: object, artifact: Path, out: Path) -> dict[str, np.ndarray]:
    run(python, "-c", RUN, artifact, out)
    with np.load(out) as found:
        return dict(found)


@pytest.mark.parametrize("compiler", [sys.executable, OTHER], ids=["of 2.10", "of 2.8"])
def test_graphs_run_alike_under_both(checkpoint: Checkpoints, tmp_path: Path, compiler: object) -> None:
    root = tmp_path / "artifact"
    run(sys.executable, "-m", "msconv", "convert", "--model", checkpoint("untied"), "--tp", 1, "--output", root)
    run(compiler, "-m", "msconv", "compile", root, "--target", "cpu")
    new, old = logits(sys.executable, root, tmp_path / "new.npz"), logits(OTHER, root, tmp_path / "old.npz")
    for name, found in new.items():
        np.testing.assert_allclose(old[name], found, atol=2e-5)


@pytest.mark.parametrize("target", ["ascend910b", "ascend310p", "cpu"])
def test_graphs_of_28_are_proven(checkpoint: Checkpoints, tmp_path: Path, target: str) -> None:
    root = tmp_path / "artifact"
    source = checkpoint("untied")
    run(sys.executable, "-m", "msconv", "convert", "--model", source, "--tp", 2, "--output", root)
    run(OTHER, "-m", "msconv", "compile", root, "--target", target)
    run(sys.executable, "-m", "msconv", "verify", root, "--target", target, "--reference", source)

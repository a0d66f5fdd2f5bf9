"""Quantised artifacts on a CPU: the graphs of compiled kernels, beside those of MindSpore's own operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msconv.steps.compile import compile_graphs
from msconv_runtime import Session
from msconv_runtime.kernels import library
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.moe_checkpoints import make_deepseek_v3, make_qwen3_moe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library().path is None, reason="needs a C++ compiler"),
]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen3": make_qwen3,
    "qwen3_moe": make_qwen3_moe,
    "deepseek_v3": make_deepseek_v3,
}
BOUND = 1e-4
FLIPPED = 0.5  # what a code that one of the two rounds the other way may do to logits of its sequence


@pytest.fixture(scope="module", params=FAMILIES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("int8") / "artifact"
    convert(FAMILIES[request.param](root.with_name("model")), root, quant="w8a8")
    compile_graphs(root, "cpu")
    return root


def test_both_ways_give_the_same_logits(artifact: Path) -> None:
    """Of most sequences; in the others, two sums that differ in their last bit were rounded to different codes."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 500, n).tolist() for n in (1, 2, 2, 3, 3, 4, 5, 5, 6)]
    found = []
    for session in (Session(artifact), Session(artifact, compiled=False)):
        found.append(np.stack([session.prefill(prompts), session.decode(list(range(9)))]))
        assert session.graphs.compiles_since_ready == 0
    away = np.abs(found[0] - found[1]).max((0, 2))
    assert np.median(away) < BOUND, away
    assert away.max() < FLIPPED, away


def test_matrices_stay_codes_where_they_are_mapped(artifact: Path) -> None:
    """No copy, and none that is wider: the graph's own parameters are the files' pages."""
    session = Session(artifact)
    session.generate([[1, 2, 3]], 3)
    mapped = [line.split()[0].split("-") for line in _maps() if line.endswith(".safetensors")]
    pages = [range(int(first, 16), int(last, 16)) for first, last in mapped]
    assert session.graphs.is_compiled
    cells = session.graphs.cells.values()
    codes = {name: p for cell in cells for name, p in cell._params.items() if str(p.dtype) == "Int8"}
    assert codes
    for name, tensor in session.graphs.tensors.items():
        assert name not in codes or any(tensor.data_ptr() in part for part in pages), name
    for name, parameter in codes.items():
        assert any(parameter.data_ptr() in part for part in pages), name


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()

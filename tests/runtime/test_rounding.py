"""Kernels that round activations to bfloat16 in products of many rows: where they do, how, and what it changes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from msconv_runtime.kernels import Library, _first_that_works, library
from msconv_runtime.kernels.check import call, narrow, rounded, upcast
from msconv_runtime.kernels.compiler import find_compiler
from msconv_runtime.kernels.variants import VARIANTS, features
from tests.conftest import Checkpoints
from tests.conversions import convert

ROUNDING = VARIANTS[0]
pytestmark = pytest.mark.skipif(
    library().path is None or not ROUNDING.needs <= features(),
    reason="needs a compiler, and a processor with AVX512_BF16",
)
MOST = 32  # rows that are not rounded


@pytest.fixture(scope="module")
def kernels() -> Library:
    return _first_that_works(find_compiler(), [ROUNDING])


def test_rounding_is_that_of_bfloat16() -> None:
    x = np.random.default_rng(0).standard_normal((50, 40), np.float32)
    x[0, :4] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, 1e38
    assert np.array_equal(rounded(x), x.astype(bfloat16).astype(np.float32))


@pytest.mark.parametrize(("width", "depth"), [(150, 1100), (64, 64), (33, 2), (1, 30), (129, 2080)])
def test_many_rows_are_rounded_and_few_are_not(kernels: Library, width: int, depth: int) -> None:
    assert kernels.path is not None
    rng = np.random.default_rng(0)
    stored = narrow(rng.standard_normal((width, depth), np.float32))
    weight = upcast(stored).astype(np.float64)
    for rows in (1, 5, 6, MOST, MOST + 1, 48, 97):
        x = rng.standard_normal((rows, depth), np.float32)
        taken = rounded(x) if rows > MOST else x
        (found,) = call(kernels.path, "Product", [x, stored], (rows, width))
        error = np.abs(found - taken.astype(np.float64) @ weight.T) / (np.abs(x) @ np.abs(weight).T)
        assert error.max() < 2e-6, (rows, float(error.max()))


@pytest.mark.parametrize(("depth", "is_narrow"), [(1101, True), (1100, False)], ids=["odd depth", "float32"])
def test_what_has_no_pairs_of_bfloat16_is_not_rounded(kernels: Library, depth: int, is_narrow: bool) -> None:
    assert kernels.path is not None
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((70, depth), np.float32), rng.standard_normal((40, depth), np.float32)
    stored = narrow(weight) if is_narrow else weight
    (found,) = call(kernels.path, "Product", [x, stored], (70, 40))
    assert np.abs(found - x @ upcast(stored).T).max() < 1e-4 * np.sqrt(depth)


def test_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert _first_that_works(find_compiler(), [ROUNDING]).variant == ROUNDING.name
    assert [m.split(":")[1] for m in caplog.messages] == [f" MSCONV_KERNELS={ROUNDING.name}"]


LOGITS = """
import json, sys
from msconv_runtime import Session
session = Session(sys.argv[1])
prompt = session.prefill([[i % 90 for i in range(70)]])
print(json.dumps([prompt[0].tolist(), session.decode([7])[0].tolist()]))
"""


def test_a_prompt_is_rounded_a_little(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from msconv.steps.compile import compile_graphs

    convert(checkpoint("bfloat16_shards"), tmp_path / "artifact")
    compile_graphs(tmp_path / "artifact", "cpu")
    found = []
    for choice in ("", ROUNDING.name):
        environment = {**os.environ, "MSCONV_KERNELS": choice}
        command = [sys.executable, "-c", LOGITS, str(tmp_path / "artifact")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append([np.array(row) for row in json.loads(done.stdout.splitlines()[-1])])
    for exact, off in zip(*found, strict=True):
        size = float(np.abs(exact).max())
        assert 0 < np.abs(off - exact).max() < 0.05 * size

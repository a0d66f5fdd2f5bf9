"""Products of the compiled kernels for every number of rows at which they take another way, against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from msconv_runtime.kernels import library
from msconv_runtime.kernels.check import Array, call, narrow, swiglu, upcast

pytestmark = pytest.mark.skipif(library().path is None, reason=f"no kernels: {library().why}")

# Shared by threads and not, in several parts of the depth, with rests of columns and of the depth, and with none.
SHAPES = ((150, 1100), (17, 2100), (33, 3), (64, 64), (1, 31), (129, 1024), (40, 287))


@pytest.mark.parametrize("store", [np.asarray, narrow], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_products_of_any_number_of_rows(store: Callable[[Array], Array], width: int, depth: int) -> None:
    path, rng = library().path, np.random.default_rng(0)
    assert path is not None
    stored = store(rng.standard_normal((width, depth), np.float32))
    weight = upcast(stored) if stored.dtype == np.uint16 else stored
    for rows in (*range(1, 18), 24, 25, 47, 48, 49, 60, 97):
        x = rng.standard_normal((rows, depth), np.float32)
        (found,) = call(path, "Product", [x, stored], (rows, width))
        right = x.astype(np.float64) @ weight.astype(np.float64).T
        error = np.abs(found - right) / (np.abs(x) @ np.abs(weight).T)
        assert error.max() < 2e-6, (rows, float(error.max()))


def test_an_mlp_of_any_number_of_rows() -> None:
    path, rng = library().path, np.random.default_rng(0)
    assert path is not None
    both, down = (rng.standard_normal(shape, np.float32) / 8 for shape in ((2 * 75, 70), (41, 75)))
    for rows in (1, 5, 6, 48, 49):
        x = rng.standard_normal((rows, 70), np.float32)
        (found,) = call(path, "Mlp", [x, both, down], (rows, 41))
        assert np.abs(found - swiglu(x @ both.T) @ down.T).max() < 1e-4, rows

"""FP8 to other types: the published rule, bit for bit, whoever does the lookups; and matrices transposed."""

from __future__ import annotations

import importlib.util
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from msconv.quant import kernels
from msconv.quant.fp8_block import Blocks, count_nan, dequantise
from tests.commands import run_python
from tests.moe_checkpoints import E4M3

Array = NDArray[Any]
Block = tuple[int, int]

DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
SIZES = [(192, 320), (128, 128), (1, 129), (129, 1), (1, 1), (257, 130)]
BLOCKS = [(128, 128), (64, 128), (1, 128), (128, 1), (7, 300)]
SCALES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0**-149,  # the smallest there is
    1e-40,
    -1e-42,
    2.0**-126,
    2.0**-14 / 448,
    65504 / 448,
    65519 / 448,
    65520 / 448,
    -65536 / 448,
    1e30,
    3.3895314e38 / 448,
    3.4e38 / 448,
    -7e35,
    3e38,
    -3.4028235e38,
]


@pytest.fixture(params=["numba", "numpy"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each of the two makers of inner loops, chosen."""
    chosen: Any = kernels.Numpy
    if request.param == "numba":
        pytest.importorskip("numba")
        from msconv.quant import compiled

        chosen = compiled
    monkeypatch.setattr(kernels, "_chosen", chosen)
    return chosen


def both() -> list[Any]:
    """For tests that draw their cases: numba's too where it is there."""
    if importlib.util.find_spec("numba") is None:
        return [kernels.Numpy]
    from msconv.quant import compiled

    return [kernels.Numpy, compiled]


def rounded(exact: NDArray[np.float64], dtype: str) -> Array:
    """Products of float32 numbers (exact in float64) as float32, and that once more rounded; as bit patterns."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        wide = exact.astype(np.float32)
        if dtype == "float32":
            return wide.view(np.uint32)
        if dtype == "float16":
            return wide.astype(np.float16).view(np.uint16)
    bits = wide.view(np.uint32).astype(np.uint64)
    even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even
    return np.where(np.isnan(wide), bits >> 16 | 0x40, even).astype(np.uint16)


def reference(codes: Array, scales: Array, block: Block, dtype: str) -> Array:
    """The published rule, element by element: the bit patterns of float32(code) * scale of its block."""
    rows, columns = np.indices(codes.shape)
    each = scales[rows // block[0], columns // block[1]].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return rounded(E4M3[codes].astype(np.float64) * each, dtype)


def same(found: Array, wanted: Array, dtype: str) -> bool:
    """Equal bits, except that any NaN is as good as another."""
    a, b = found.view(DTYPES[dtype]).astype(np.float32), wanted.view(DTYPES[dtype]).astype(np.float32)
    nan = np.isnan(b)
    return found.shape == wanted.shape and bool(
        np.array_equal(np.isnan(a), nan) and np.array_equal(found[~nan], wanted[~nan])
    )


def bits_of(values: Array) -> Array:
    return values.view(f"u{values.itemsize}")


def grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def random_scales(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Of any size a scale can have, and of any sign."""
    with np.errstate(under="ignore"):
        sizes = np.exp2(rng.uniform(-149, 127, shape)) * rng.choice([-1.0, 1.0], shape)
    return sizes.astype(np.float32)


def random_codes(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.uint8]:
    return rng.integers(0, 256, shape, np.uint8)


# Values


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_times_every_kind_of_scale_is_the_published_value(loops: Any, dtype: str) -> None:
    scales = np.array(SCALES, np.float32)[:, None]
    scales = np.concatenate([scales, random_scales(np.random.default_rng(0), (200, 1))])
    codes = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (len(scales), 1))
    found = dequantise(codes, scales, (16, 16), np.dtype(DTYPES[dtype]))
    assert found.dtype == DTYPES[dtype]
    assert same(bits_of(found), reference(codes, scales, (16, 16), dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_two_codes_that_are_no_number_stay_so_and_no_other_becomes_so(loops: Any, dtype: str) -> None:
    scales = np.array(SCALES, np.float32)[None]
    codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], len(SCALES), 1)
    found = dequantise(codes, scales, (256, 1), np.dtype(DTYPES[dtype])).astype(np.float32)
    assert np.array_equal(np.isnan(found), (codes == 0x7F) | (codes == 0xFF))
    assert count_nan(codes) == 2 * len(SCALES)
    assert count_nan(codes[:127]) == 0


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SIZES)
def test_any_size_and_any_block(loops: Any, shape: tuple[int, int], block: Block) -> None:
    rng = np.random.default_rng(sum(shape) + sum(block))
    codes, scales = random_codes(rng, shape), random_scales(rng, grid(shape, block))
    for dtype in DTYPES:
        found = dequantise(codes, scales, block, np.dtype(DTYPES[dtype]))
        assert same(bits_of(found), reference(codes, scales, block, dtype), dtype), dtype


@pytest.mark.parametrize("step", [1, 5, 64, 128, 200])
def test_rows_some_at_a_time_are_the_rows_all_at_once(loops: Any, step: int) -> None:
    rng = np.random.default_rng(step)
    codes, scales = random_codes(rng, (192, 70)), random_scales(rng, (3, 3))
    blocks = Blocks(scales, (64, 32), np.dtype(np.float32))
    found = np.zeros(codes.shape, np.uint32)
    for first in range(0, 192, step):
        blocks.rows(codes[first : first + step], first, found[first : first + step])
    assert same(found, reference(codes, scales, (64, 32), "float32"), "float32")


def test_torch_agrees(loops: Any) -> None:
    """One more reader of FP8 codes and writer of narrow numbers than numpy and ml_dtypes."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    codes, scales = random_codes(rng, (192, 320)), rng.uniform(-2, 2, (2, 3)).astype(np.float32)
    spread = torch.from_numpy(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)[:192, :320]
    wide = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float() * spread
    for dtype in ("bfloat16", "float16"):
        wanted = wide.to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)
        found = dequantise(codes, scales, (128, 128), np.dtype(DTYPES[dtype]))
        assert same(bits_of(found), wanted, dtype)


# What float16 cannot hold


@pytest.mark.parametrize("scale", [65504 / 448, 65519 / 448, 65520 / 448, -65536 / 448, 1e4, 1e36, -3e38])
def test_values_beyond_float16_are_counted(scale: float) -> None:
    """Those whose product is beyond float32 are beyond float16 too."""
    codes = np.tile(np.arange(256, dtype=np.uint8).reshape(2, 128), (1, 2))
    codes = codes[:, codes[0] != 0x7F]
    scales = np.array([[scale, 1.0]], np.float32)
    blocks = Blocks(scales, (2, 127), np.dtype(np.float16))
    exact = np.abs(E4M3[codes[:, :127]].astype(np.float64) * np.float64(np.float32(scale)))
    assert lost(blocks, codes, 0) == int((exact >= 65520).sum())


def test_a_large_scale_of_small_codes_loses_nothing() -> None:
    blocks = Blocks(np.array([[1.0], [1000.0]], np.float32), (2, 4), np.dtype(np.float16))
    codes = np.array([[0x7E] * 4, [0x7E] * 4, [0x30] * 4, [0x38, 0x38, 0x7E, 0xFE]], np.uint8)  # 448, 448, 0.5, 1
    assert lost(blocks, codes[:3], 0) == 0
    assert lost(blocks, codes, 0) == 2
    assert lost(blocks, codes[3:], 3) == 2
    assert lost(blocks, codes[3:], 0) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wider_ranges_hold_the_same_values(dtype: str) -> None:
    blocks = Blocks(np.array([[1e4]], np.float32), (4, 4), np.dtype(DTYPES[dtype]))
    assert lost(blocks, np.full((4, 4), 0x7E, np.uint8), 0) == 0


def lost(blocks: Blocks, codes: Any, first: int) -> int:
    """How many values cannot be held, said the same by rows and by a rectangle."""
    out = np.empty(codes.shape, f"u{blocks.dtype.itemsize}")
    found = blocks.rows(codes, first, out)
    assert blocks.transposed(codes, first, 0, np.empty(codes.shape[::-1], out.dtype)) == found
    return found


# Transposed


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[tuple[int, int], Block, tuple[int, int, int, int], int, int]:
    """A matrix, its blocks, a rectangle of it, columns left of where it goes, and a seed."""
    rows, columns = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    block = (draw(st.sampled_from([1, 3, 16, 17, 64, 128, 200])), draw(st.sampled_from([1, 5, 16, 40, 128, 151])))
    top, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    height, width = draw(st.integers(1, rows - top)), draw(st.integers(1, columns - left))
    return (
        (rows, columns),
        block,
        (top, left, height, width),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 2**32 - 1)),
    )


@given(rectangles(), st.sampled_from(["bfloat16", "float32"]))
@settings(deadline=None, max_examples=60)
def test_any_rectangle_transposed_is_the_transpose_of_the_published_values(case: Any, dtype: str) -> None:
    shape, block, (top, left, height, width), margin, seed = case
    rng = np.random.default_rng(seed)
    codes, scales = random_codes(rng, shape), random_scales(rng, grid(shape, block))
    blocks = Blocks(scales, block, np.dtype(DTYPES[dtype]))
    wanted = reference(codes, scales, block, dtype)[top : top + height, left : left + width].T
    for chosen in both():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_chosen", chosen)
            wide = np.full((width, margin + height + 1), 0xABCD, wanted.dtype)
            blocks.transposed(
                codes[top : top + height, left : left + width], top, left, wide[:, margin : margin + height]
            )
            assert same(wide[:, margin : margin + height], wanted, dtype), chosen
            wide[:, margin : margin + height] = 0xABCD
            assert (wide == 0xABCD).all(), "it wrote beside its place"


@given(rectangles(), st.sampled_from(["u2", "u4"]))
@settings(deadline=None, max_examples=60)
def test_any_rectangle_is_transposed_bit_for_bit(case: Any, kind: str) -> None:
    shape, _, (top, left, height, width), margin, seed = case
    matrix = np.random.default_rng(seed).integers(0, 1 << 16, shape).astype(kind)
    wanted = matrix[top : top + height, left : left + width].T
    for chosen in both():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_chosen", chosen)
            wide = np.full((width, margin + height + 1), 0xABCD, kind)
            kernels.transpose(matrix[top : top + height, left : left + width], wide[:, margin : margin + height])
            assert np.array_equal(wide[:, margin : margin + height], wanted), chosen
            wide[:, margin : margin + height] = 0xABCD
            assert (wide == 0xABCD).all(), "it wrote beside its place"


def test_turning_over_twice_is_nothing(loops: Any) -> None:
    matrix = np.random.default_rng(0).integers(0, 1 << 16, (200, 130), np.uint16)
    once, twice = np.empty((130, 200), np.uint16), np.empty((200, 130), np.uint16)
    kernels.transpose(matrix, once)
    kernels.transpose(once, twice)
    assert not np.array_equal(once.ravel(), matrix.ravel())
    assert np.array_equal(twice, matrix)


# Which loops

CHOICE = """
import os, sys
how = sys.argv[1]
if how == "unwanted":
    os.environ["MSCONV_NUMBA"] = "0"
else:
    os.environ.pop("MSCONV_NUMBA", None)
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
import hashlib
import numpy as np
from msconv.quant import kernels
from msconv.quant.fp8_block import dequantise
rng = np.random.default_rng(0)
codes, scales = rng.integers(0, 256, (300, 200), np.uint8), rng.normal(0, 1, (3, 2)).astype(np.float32)
out = dequantise(codes, scales, (128, 128), np.dtype(np.float16))
print(kernels._kernels() is kernels.Numpy, "numba" in sys.modules, hashlib.sha256(out.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("how", ["unwanted", "missing"])
def test_without_numba_numpy_gives_the_same_bytes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    pytest.importorskip("numba")
    from msconv.quant import compiled

    done = run_python(CHOICE, how)
    assert done.code == 0, done.stderr
    plain, imported, digest = done.stdout.split()
    assert (plain, imported) == ("True", "False")
    monkeypatch.setattr(kernels, "_chosen", compiled)
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (300, 200), np.uint8), rng.normal(0, 1, (3, 2)).astype(np.float32)
    out = dequantise(codes, scales, (128, 128), np.dtype(np.float16))
    assert hashlib.sha256(out.tobytes()).hexdigest() == digest


def test_numba_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from msconv.quant import compiled

    monkeypatch.setattr(kernels, "_chosen", None)
    monkeypatch.delenv("MSCONV_NUMBA", raising=False)
    assert kernels._kernels() is compiled

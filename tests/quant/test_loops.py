"""The loops give the same bits whether numba or numpy runs them, and those of a plain rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.quant import compiled, kernels
from msconv.quant.fp8_block import CODES, Blocks
from msconv.quant.kernels import Numpy
from msconv_runtime.errors import CheckpointError
from tests.commands import run_python
from tests.int8_checkpoints import quantised
from tests.quant.conftest import Int8

LOOPS: tuple[Any, ...] = (Numpy, compiled)
SHAPES = [(1, 1), (3, 17), (16, 40), (8, 8), (64, 64), (72, 136), (130, 24), (7, 64), (64, 7)]


def values(rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Numbers of all sizes, ties between codes, zeros of both signs, and what is smaller than a normal number."""
    rng = np.random.default_rng(seed)
    out = (rng.normal(0, 1, (rows, columns)) * 10.0 ** rng.integers(-30, 30, (rows, 1))).astype(np.float32)
    out[rng.random(out.shape) < 0.05] = -0.0
    ties = rng.random(out.shape) < 0.1
    out[ties] = (rng.integers(-127, 127, ties.sum()) + np.float32(0.5)) * np.float32(2.0**-7)
    out[rng.random(out.shape) < 0.02] = np.float32(-1e-41)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_largest_magnitudes_and_codes(shape: tuple[int, int]) -> None:
    given = values(*shape)
    codes, scales = quantised(given)
    for loops in LOOPS:
        largest, out = np.empty((shape[0], 1), np.float32), np.empty(shape, np.int8)
        loops.largest_magnitudes(given, largest)
        assert np.array_equal(largest, np.abs(given).max(1, keepdims=True))
        loops.encode(given, scales, out)
        assert np.array_equal(out, codes)


def test_codes_of_ties_are_even() -> None:
    halves = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5))[None]
    for loops in LOOPS:
        out = np.empty(halves.shape, np.int8)
        loops.encode(halves, np.ones((1, 1), np.float32), out)
        assert not (out % 2).any()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_never_the_smaller_one(bad: float) -> None:
    for place in (0, 5, 8):
        given = values(3, 9)
        given[1, place] = bad
        for loops in LOOPS:
            largest = np.empty((3, 1), np.float32)
            loops.largest_magnitudes(given, largest)
            assert np.isfinite(largest[:, 0]).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_codes_times_scales(shape: tuple[int, int]) -> None:
    """Every code, by arithmetic in float32; the same bits as tables of whole blocks have."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    for block in ((16, 40), (128, 128), (1, 3)):
        size = (-(-(shape[0] + 5) // block[0]), -(-shape[1] // block[1]))
        scales = (10.0 ** rng.uniform(-6, 2, size)).astype(np.float32)
        rows, columns = (np.arange(shape[0]) + 5) // block[0], np.arange(shape[1]) // block[1]
        wanted = CODES[codes] * scales[rows[:, None], columns]
        for loops in LOOPS:
            out = np.empty(shape, np.float32)
            loops.scaled(codes, CODES, scales, 5, *block, out)
            assert np.array_equal(out.view(np.uint32), wanted.view(np.uint32))
        decoded = np.empty(shape, np.uint32)
        assert Blocks(scales, block, np.dtype(np.float32)).rows(codes, 5, decoded) == 0
        assert np.array_equal(decoded, wanted.view(np.uint32))


@pytest.mark.parametrize("shape", [*SHAPES, (130, 390)])
@pytest.mark.parametrize("sizes", [(-6, 2), (-40, -30), (20, 35)])
def test_int8_codes_straight_from_fp8(shape: tuple[int, int], sizes: tuple[int, int]) -> None:
    """Those that their values get, of every FP8 code and of products too small for a normal number."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    codes[rng.random(shape) < 0.3] &= 0x87  # of the smallest exponent
    for block in ((16, 40), (128, 128), (1, 3)):
        size = (-(-(shape[0] + 5) // block[0]), -(-shape[1] // block[1]))
        scales = (10.0 ** rng.uniform(*sizes, size)).astype(np.float32)
        given = np.empty(shape, np.float32)
        decoder = Blocks(scales, block, np.dtype(np.float32))
        assert decoder.rows(codes, 5, given.view(np.uint32)) == 0
        wanted, divisors = quantised(given)
        largest = decoder.largest(codes, 5)
        assert largest is not None
        assert np.array_equal(largest, np.abs(given).max(1, keepdims=True))
        for loops in LOOPS:
            found, made = np.empty((shape[0], size[1]), np.uint8), np.empty(shape, np.int8)
            loops.largest_codes(codes, block[1], found)
            assert np.array_equal(found, np.maximum.reduceat(codes & 0x7F, range(0, shape[1], block[1]), 1))
            loops.encode_fp8(codes, scales, divisors, 5, *block, made)
            assert np.array_equal(made, wanted)


def test_int8_codes_straight_from_fp8_need_values_that_float32_holds() -> None:
    sound, large = (Blocks(np.full((1, 1), s, np.float32), (1, 3), np.dtype(np.float32)) for s in (1, 3e37))
    assert large.largest(np.array([[0x7E, 0x01, 0xFE]], np.uint8), 0) is None
    with pytest.raises(CheckpointError, match="1 of its FP8 codes are no number"):
        sound.largest(np.array([[0x7E, 0xFF, 0x01]], np.uint8), 0)


def test_fp8_scales_that_float32_cannot_hold_are_counted() -> None:
    scales = np.full((1, 1), 3e37, np.float32)
    out = np.empty((1, 3), np.uint32)
    codes = np.array([[0x7E, 0x01, 0xFE]], np.uint8)
    assert Blocks(scales, (1, 3), np.dtype(np.float32)).rows(codes, 0, out) == 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_transposing_whole_matrices_and_columns_of_them(shape: tuple[int, int], dtype: Any) -> None:
    rows, columns = shape
    whole = np.random.default_rng(2).integers(0, 255, (rows, columns + 16)).astype(dtype)
    for left in (0, 8, 3):
        piece = whole[:, left : left + columns]
        for wide in (0, 8):
            place = np.zeros((columns, rows + wide), dtype)
            kernels.transpose(piece, place[:, :rows])
            assert np.array_equal(place[:, :rows], piece.T)
            assert not place[:, rows:].any()


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (72, 136), (136, 72)])
def test_transposing_words_of_bytes(shape: tuple[int, int]) -> None:
    given = np.random.default_rng(3).integers(0, 255, shape).astype(np.uint8)
    for loops in LOOPS:
        out = np.empty(shape[::-1], np.uint8)
        loops.transpose_bytes(given.view(np.uint64), out.view(np.uint64))
        assert np.array_equal(out, given.T)


CONVERT = """
import sys
from pathlib import Path
from msconv.quant import kernels
from tests.conversions import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), 4, ep=2, quant="w8a8")
assert kernels._kernels() is kernels.Numpy
"""


def test_conversions_without_numba_give_the_same_bytes(
    source: Int8, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conversions import convert

    model = source("deepseek_v3", "FP8")
    convert(model, tmp_path / "numba", 4, ep=2, quant="w8a8")
    monkeypatch.setenv("MSCONV_NUMBA", "0")
    done = run_python(CONVERT, model, tmp_path / "numpy")
    assert done.code == 0, done.stderr
    for path in (tmp_path / "numba" / "weights").iterdir():
        assert path.read_bytes() == (tmp_path / "numpy" / "weights" / path.name).read_bytes()

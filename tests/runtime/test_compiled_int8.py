"""Compiled kernels of int8: the same integers as NumPy's, bit for bit, with the processor's instructions for them
and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msconv_runtime import kernels
from msconv_runtime.kernels import check, library
from msconv_runtime.kernels.compiler import find_compiler

Array = Any
PATH = library().path
pytestmark = pytest.mark.skipif(PATH is None, reason="needs a C++ compiler")
WITHOUT = ("-mno-avx512vnni", "-mno-avxvnni")
DEPTHS = st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 1024, 1025, 3072]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as it is built where the processor has no products of bytes."""
    path = tmp_path_factory.mktemp("plain") / "kernels.so"
    here = Path(kernels.__file__).parent
    find_compiler().build((*kernels.FLAGS, *WITHOUT, *(str(here / name) for name in kernels.UNITS)), path)
    return path


def run(name: str, inputs: list[Array], width: int, path: Path | None = None) -> Array:
    path = path or PATH
    assert path is not None
    (found,) = check.call(path, name, inputs, (len(inputs[0]), width))
    return found


def drawn(seed: int, tokens: int, depth: int, width: int) -> tuple[Array, Array, Array]:
    """Rows of many magnitudes, all codes of weights, scales."""
    rng = np.random.default_rng([seed, tokens, depth, width])
    x = rng.standard_normal((tokens, depth), np.float32) * np.exp(rng.uniform(-20, 20, (tokens, 1)))
    x *= rng.random((tokens, depth)) < 0.9
    weight = rng.integers(-128, 128, (width, depth)).astype(np.int8)
    return x.astype(np.float32), weight, rng.uniform(1e-4, 1e-2, (width, 1)).astype(np.float32)


def static_inputs(seed: int, width: int) -> list[Array]:
    rng = np.random.default_rng([seed, width])
    deq = rng.uniform(1e-4, 1e-2, width).astype(np.float32)
    bias = rng.integers(-(2**31), 2**31, width).astype(np.int32)
    scale = np.exp(rng.uniform(-5, 2, 1)).astype(np.float32)
    return [deq, bias, scale, rng.integers(-128, 128, 1).astype(np.float32)]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 99), tokens=st.integers(0, 30), depth=DEPTHS, width=st.integers(1, 90))
def test_a_product_with_a_scale_a_token(seed: int, tokens: int, depth: int, width: int) -> None:
    x, weight, scale = drawn(seed, tokens, depth, width)
    expected = check.product_int8(x, weight, scale) if tokens else np.empty((0, width), np.float32)
    assert run("ProductInt8", [x, weight, scale], width).tobytes() == expected.tobytes()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 99), tokens=st.integers(0, 30), depth=DEPTHS, width=st.integers(1, 90))
def test_a_product_with_a_scale_an_input(seed: int, tokens: int, depth: int, width: int) -> None:
    x, weight, _ = drawn(seed, tokens, depth, width)
    inputs = static_inputs(seed, width)
    found = run("ProductInt8Static", [x, weight, *inputs], width)
    assert found.tobytes() == check.product_int8_static(x, weight, *inputs).tobytes()


def one_code(codes: Array) -> tuple[Array, Array]:
    """Weights and scales whose products are the codes themselves, in float32."""
    depth = codes.shape[1]
    return np.eye(depth, dtype=np.int8), np.ones((depth, 1), np.float32)


def test_codes_are_rounded_half_to_even() -> None:
    """Every tie of the range, and its neighbours in float32: their largest value makes the scale 1."""
    ties = np.arange(-126.5, 127, 1, np.float32)
    values = np.concatenate([ties, np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(-1e9))])
    x = np.concatenate([[np.float32(127)], values])[None].astype(np.float32)
    eye, ones = one_code(x)
    found = run("ProductInt8", [x, eye, ones], x.shape[1])
    assert np.array_equal(found, np.rint(x))
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    inputs = [ones[:, 0], np.zeros(x.shape[1], np.int32), one, zero]
    assert np.array_equal(run("ProductInt8Static", [x, eye, *inputs], x.shape[1]), np.rint(x))


def test_codes_of_an_input_are_rounded_after_the_product_and_after_the_sum() -> None:
    """A fused multiplication and addition rounds once: among so many values it would give other codes."""
    rng = np.random.default_rng(0)
    scale, offset = np.array([0.0173], np.float32), np.array([-3], np.float32)
    inverse = np.float32(1) / scale
    near = ((rng.integers(-100, 100, 200_000) + 0.5 - offset) / inverse).astype(np.float32)
    once = np.rint((near.astype(np.float64) * inverse.astype(np.float64) + offset).astype(np.float32))
    twice = np.rint(near * inverse + offset)
    x = near[once != twice][:256][None]
    assert x.shape[1] > 20
    eye, ones = one_code(x)
    inputs = [ones[:, 0], np.zeros(x.shape[1], np.int32), scale, offset]
    found = run("ProductInt8Static", [x, eye, *inputs], x.shape[1])
    assert np.array_equal(found[0], twice[once != twice][:256])


def test_what_lies_outside_the_range_gets_the_code_at_its_end() -> None:
    x = np.array([[-1e9, -129.4, -128.4, 127.4, 128.6, 1e30, np.inf, -np.inf]], np.float32)
    eye, ones = one_code(x)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    found = run("ProductInt8Static", [x, eye, ones[:, 0], np.zeros(8, np.int32), one, zero], 8)
    assert found[0].tolist() == [-128, -128, -128, 127, 127, 127, 127, -128]


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-42])
def test_a_row_whose_scale_is_zero_has_codes_of_zero(value: float) -> None:
    """So small that max / 127 is 0, or hardly more: no infinity, and no code outside -127 to 127."""
    x = np.full((3, 70), value, np.float32)
    x[1] = 1.0
    weight = np.full((5, 70), 127, np.int8)
    scale = np.ones((5, 1), np.float32)
    found = run("ProductInt8", [x, weight, scale], 5)
    assert found.tobytes() == check.product_int8(x, weight, scale).tobytes()
    assert (found[1] > 1000).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spoils_its_row_only(bad: float) -> None:
    x, weight, scale = drawn(1, 7, 75, 9)
    right = run("ProductInt8", [x, weight, scale], 9)
    x[2, 74] = bad
    found = run("ProductInt8", [x, weight, scale], 9)
    assert not np.isfinite(found[2]).any()
    assert np.array_equal(np.delete(found, 2, 0), np.delete(right, 2, 0))


def test_the_largest_sums_are_exact() -> None:
    depth = 131_071
    x = np.full((1, depth), -1e9, np.float32)
    weight = np.full((4, depth), -128, np.int8)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    inputs = [np.ones(4, np.float32), np.zeros(4, np.int32), one, zero]
    assert run("ProductInt8Static", [x, weight, *inputs], 4)[0].tolist() == [float(2**31 - 2**14)] * 4
    longer = [np.full((1, depth + 1), 1, np.float32), np.ones((4, depth + 1), np.int8)]
    with pytest.raises(ArithmeticError, match="ProductInt8Static returned 4"):
        run("ProductInt8Static", [*longer, *inputs], 4)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 40), hidden=st.integers(1, 150), ffn=st.integers(1, 300), seed=st.integers(0, 99))
def test_both_products_of_an_mlp(tokens: int, hidden: int, ffn: int, seed: int) -> None:
    x, _, _, _, *weights = experts_drawn(seed, tokens, 1, hidden, ffn)
    inputs = [x, *(np.ascontiguousarray(a[1].T) for a in weights)]
    assert run("MlpInt8", inputs, hidden).tobytes() == check.mlp_int8(*inputs).tobytes()


def matrix_drawn(rng: Any, rows: int, columns: int) -> list[Array]:
    scales = rng.uniform(1e-4, 1e-2, (rows, 1)).astype(np.float32)
    return [rng.integers(-128, 128, (rows, columns)).astype(np.int8), scales]


SIZES = st.sampled_from([2, 20, 64, 75, 130])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40), depth=SIZES, heads=st.integers(1, 5), kv=st.integers(1, 3), half=st.integers(1, 40)
)
def test_heads_are_those_of_the_product_alone(tokens: int, depth: int, heads: int, kv: int, half: int) -> None:
    """Bit for bit what two operations give one after the other."""
    assert PATH is not None
    rng, dim = np.random.default_rng([tokens, depth, heads, kv, half]), 2 * half
    h, qkv = rng.standard_normal((tokens, depth), np.float32), matrix_drawn(rng, (heads + 2 * kv) * dim, depth)
    sizes = ((dim,), (dim,), (tokens, dim), (tokens, dim), (heads + kv,))
    rest = [*(rng.standard_normal(size, np.float32) for size in sizes), np.full(1, 1e-6, np.float32)]
    shapes = ((tokens, heads, dim), (tokens, 1, kv, dim), (tokens, 1, kv, dim))
    found = check.call(PATH, "HeadsInt8", [h, *qkv, *rest], *shapes)
    projected = run("ProductInt8", [h, *qkv], len(qkv[0]))
    parts = check.call(PATH, "SplitHeads", [projected, *rest], *shapes)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in parts]


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), depth=SIZES, width=SIZES, ffn=st.integers(1, 200))
def test_what_follows_attention_is_what_its_parts_give(tokens: int, depth: int, width: int, ffn: int) -> None:
    """Bit for bit what four operations give one after the other."""
    assert PATH is not None
    rng, shape = np.random.default_rng([tokens, depth, width, ffn]), (tokens, width)
    mixed, x = rng.standard_normal((tokens, depth), np.float32), rng.standard_normal(shape, np.float32)
    o, mlp = matrix_drawn(rng, width, depth), [*matrix_drawn(rng, 2 * ffn, width), *matrix_drawn(rng, width, ffn)]
    own, following = rng.standard_normal((2, width), np.float32)
    eps = np.full(1, 1e-6, np.float32)
    inputs = [mixed, x, *o, own, *mlp, following, eps]
    found = check.call(PATH, "AfterAttentionInt8", inputs, shape, shape)
    h, total = check.call(PATH, "AddNorm", [run("ProductInt8", [mixed, *o], width), x, own, eps], shape, shape)
    parts = check.call(PATH, "AddNorm", [run("MlpInt8", [h, *mlp], width), total, following, eps], shape, shape)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in parts]


@pytest.mark.parametrize("name", ["HeadsInt8", "MlpInt8", "AfterAttentionInt8"])
def test_operations_of_several_parts_refuse_what_does_not_fit(name: str) -> None:
    """Each input in turn has a row or a column too many: nothing is read that is not there."""
    assert PATH is not None
    inputs, outputs = check.examples(np.random.default_rng(0))[name]
    shapes = [a.shape for a in outputs]
    check.call(PATH, name, inputs, *shapes)
    for i, whole in enumerate(inputs):
        for axis in range(whole.ndim):
            wrong = [np.concatenate([a, a.take([0], axis)], axis) if j == i else a for j, a in enumerate(inputs)]
            with pytest.raises(ArithmeticError, match=f"{name} returned 4"):
                check.call(PATH, name, wrong, *shapes)
    with pytest.raises(ArithmeticError, match=f"{name} returned 4"):
        check.call(PATH, name, inputs[:-1], *shapes)


def experts_drawn(seed: int, tokens: int, top_k: int, hidden: int, ffn: int) -> list[Array]:
    """Gates are above 20, where silu of one is itself however e^-x is computed: codes are the same everywhere."""
    rng = np.random.default_rng([seed, tokens, top_k, hidden, ffn])
    ids = np.stack([rng.permutation(6)[:top_k] for _ in range(tokens)]).astype(np.int32)
    gate_up = rng.integers(-128, 128, (4, hidden, 2 * ffn))
    gate_up[:, :, :ffn] = 40 + np.abs(gate_up[:, :, :ffn]) // 2
    shares = rng.uniform(0, 1, (tokens, top_k)).astype(np.float32)
    return [
        np.abs(rng.standard_normal((tokens, hidden), np.float32)) + np.float32(0.5),
        shares,
        ids,
        np.array([1], np.int32),
        gate_up.astype(np.int8),
        rng.uniform(2 / hidden, 4 / hidden, (4, 1, 2 * ffn)).astype(np.float32),
        rng.integers(-128, 128, (4, ffn, hidden)).astype(np.int8),
        rng.uniform(1e-4, 2e-4, (4, 1, hidden)).astype(np.float32),
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 150),
    ffn=st.integers(1, 300),
)
def test_experts(seed: int, tokens: int, top_k: int, hidden: int, ffn: int) -> None:
    """Of one choice a token, the same bits; of several, the sum of them is rounded here and there."""
    inputs = experts_drawn(seed, tokens, top_k, hidden, ffn)
    x, shares, ids, start, *weights = inputs
    found = run("ExpertsInt8", inputs, hidden)
    expected = check.experts_int8(x, shares, ids - start, *weights)
    largest = float(np.abs(expected).max())
    assert np.abs(found - expected).max() <= (0 if top_k == 1 else 1e-6 * largest)


def test_many_tokens_go_through_the_experts_in_parts() -> None:
    inputs = experts_drawn(0, 2500, 1, 20, 15)
    x, shares, ids, start, *weights = inputs
    assert np.array_equal(run("ExpertsInt8", inputs, 20), check.experts_int8(x, shares, ids - start, *weights))


def test_experts_of_no_token() -> None:
    inputs = experts_drawn(0, 5, 2, 20, 15)
    inputs[:3] = [a[:0] for a in inputs[:3]]
    assert run("ExpertsInt8", inputs, 20).shape == (0, 20)


def test_without_the_processors_products_of_bytes_the_bits_are_the_same(plain: Path) -> None:
    assert check.wrong(plain) == ""
    for seed, tokens, depth, width in ((0, 1, 1024, 90), (1, 13, 75, 41), (2, 6, 64, 3), (3, 30, 1, 9)):
        x, weight, scale = drawn(seed, tokens, depth, width)
        for name, rest in (("ProductInt8", [scale]), ("ProductInt8Static", static_inputs(seed, width))):
            found = [run(name, [x, weight, *rest], width, path) for path in (PATH, plain)]
            assert found[0].tobytes() == found[1].tobytes(), (name, depth)
        inputs = experts_drawn(seed, tokens, 1, depth, width)
        found = [run("ExpertsInt8", inputs, depth, path) for path in (PATH, plain)]
        assert found[0].tobytes() == found[1].tobytes()

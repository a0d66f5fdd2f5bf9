"""A layer as one operation gives bit for bit what its parts give, one operation after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msconv_runtime.kernels import check, library

Array = Any
PATH = library().path
pytestmark = pytest.mark.skipif(PATH is None, reason="needs a C++ compiler")
SLOTS = 120
SIZES = st.sampled_from([2, 20, 64, 75, 130])
LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=3)  # cached, new


def run(name: str, inputs: list[Array], *shapes: tuple[int, ...]) -> list[Array]:
    assert PATH is not None
    return check.call(PATH, name, inputs, *shapes)


def drawn(
    lengths: list[tuple[int, int]], group: int, kv: int, half: int, width: int, ffn: int
) -> dict[str, Array]:
    """Inputs of Layer by name, in its order.  Matrices are float32 or bfloat16, each as it comes."""
    rng = np.random.default_rng([group, kv, half, width, ffn, *sum(lengths, ())])
    dim, heads, tokens = 2 * half, group * kv, sum(new for _, new in lengths)
    contexts, counts = (np.array(a, np.int32) for a in ([sum(one) for one in lengths], [n for _, n in lengths]))
    tables = np.full((len(lengths), int(contexts.max())), -1, np.int32)
    places, first = rng.permutation(SLOTS + int(contexts.sum())).astype(np.int32), 0
    for row, context in zip(tables, contexts, strict=True):
        row[:context] = places[first : (first := first + int(context))]

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    def matrix(*shape: int) -> Array:
        values = normal(*shape) / np.float32(shape[1] ** 0.5)
        return check.narrow(values) if rng.random() < 0.5 else values

    qkv = (heads + 2 * kv) * dim
    return {
        "h": normal(tokens, width),
        "qkv": matrix(qkv, width),
        "bias": normal(qkv) if rng.random() < 0.5 else np.zeros(1, np.float32),
        "q_norm": normal(dim),
        "k_norm": normal(dim),
        "cos": normal(tokens, dim),
        "sin": normal(tokens, dim),
        "factors": np.repeat(np.array([0.3, 1.0], np.float32), (heads, kv)),
        "eps": np.full(1, 1e-6, np.float32),
        "k_cache": normal(len(places), 1, kv, dim),
        "v_cache": normal(len(places), 1, kv, dim),
        "slots": np.concatenate([t[c - n : c] for t, c, n in zip(tables, contexts, counts, strict=True)]),
        "tables": tables,
        "context_lens": contexts,
        "q_lens": counts,
        "o": matrix(width, heads * dim),
        "x": normal(tokens, width),
        "norm": normal(width),
        "gate_up": matrix(2 * ffn, width),
        "down": matrix(width, ffn),
        "next_norm": normal(width),
    }


def attention_by_parts(a: dict[str, Array], caches: tuple[Array, Array]) -> Array:
    """Writes to the caches."""
    tokens, kv, dim = len(a["h"]), a["k_cache"].shape[2], a["k_cache"].shape[3]
    heads = len(a["factors"]) - kv
    (qkv,) = run("Product", [a["h"], a["qkv"]], (tokens, len(a["qkv"])))
    if len(a["bias"]) > 1:
        qkv = qkv + a["bias"]
    rest = [a[name] for name in ("q_norm", "k_norm", "cos", "sin", "factors", "eps")]
    q, k, v = run("SplitHeads", [qkv, *rest], (tokens, heads, dim), (tokens, 1, kv, dim), (tokens, 1, kv, dim))
    caches[0][a["slots"]], caches[1][a["slots"]] = k, v
    batch = [a[name] for name in ("tables", "context_lens", "q_lens")]
    (mixed,) = run("Attend", [q, *caches, *batch], (tokens, heads * dim))
    return run("Product", [mixed, a["o"]], (tokens, len(a["o"])))[0]


def mlp_by_parts(x: Array, gate_up: Array, down: Array) -> Array:
    (both,) = run("Product", [x, gate_up], (len(x), len(gate_up)))
    (act,) = run("Swiglu", [both], (len(x), len(gate_up) // 2))
    return run("Product", [act, down], (len(x), len(down)))[0]


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    group=st.integers(1, 3),
    kv=st.integers(1, 3),
    half=st.sampled_from([1, 7, 10, 32]),
    width=SIZES,
    ffn=st.integers(1, 150),
)
def test_a_layer_is_what_its_parts_give(
    lengths: list[tuple[int, int]], group: int, kv: int, half: int, width: int, ffn: int
) -> None:
    """Its halves too, and what is in the caches afterwards."""
    a = drawn(lengths, group, kv, half, width, ffn)
    shape = a["x"].shape
    caches = (a["k_cache"].copy(), a["v_cache"].copy())
    attended = attention_by_parts(a, caches)
    h, total = run("AddNorm", [attended, a["x"], a["norm"], a["eps"]], shape, shape)
    given_on = mlp_by_parts(h, a["gate_up"], a["down"])
    parts = run("AddNorm", [given_on, total, a["next_norm"], a["eps"]], shape, shape)

    before = {name: a[name].copy() for name in ("k_cache", "v_cache")}
    found = run("Layer", list(a.values()), shape, shape)
    assert [f.tobytes() for f in found] == [p.tobytes() for p in parts]
    assert [a[name].tobytes() for name in before] == [c.tobytes() for c in caches]
    (half_found,) = run("Attention", list((a | before).values())[:16], shape)
    assert half_found.tobytes() == attended.tobytes()
    assert [b.tobytes() for b in before.values()] == [c.tobytes() for c in caches]
    (mlp_found,) = run("Mlp", [h, a["gate_up"], a["down"]], shape)
    assert mlp_found.tobytes() == given_on.tobytes()


@pytest.mark.parametrize("name", ["slots", "tables"])
@pytest.mark.parametrize("bad", [-1, SLOTS + 30, 2**31 - 1])
def test_a_slot_that_is_not_there_is_refused_before_anything_is_written(name: str, bad: int) -> None:
    a = drawn([(20, 2), (7, 1)], 2, 1, 8, 20, 9)
    a[name] = a[name].copy()
    a[name].reshape(-1)[0] = bad
    caches = [a["k_cache"].copy(), a["v_cache"].copy()]
    with pytest.raises(ArithmeticError, match="Layer returned 2"):
        run("Layer", list(a.values()), a["x"].shape, a["x"].shape)
    with pytest.raises(ArithmeticError, match="Attention returned 2"):
        run("Attention", list(a.values())[:16], a["x"].shape)
    assert [a["k_cache"].tobytes(), a["v_cache"].tobytes()] == [c.tobytes() for c in caches]

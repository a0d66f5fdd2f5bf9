"""What the kernels must compute, in NumPy, and calling a library without MindSpore: a build is tried before it is
used."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Examples = dict[str, tuple[list[Array], list[Array]]]
TOLERANCE = 1e-4
TYPES = {"float32": b"float32", "int32": b"int32", "uint16": b"bfloat16"}


def call(library: Path, name: str, inputs: Sequence[Array], *shapes: tuple[int, ...]) -> list[Array]:
    """Run one operation.  uint16 arrays are bfloat16's bits.  Raises ArithmeticError if it refuses."""
    outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
    arrays = [np.ascontiguousarray(a) for a in inputs] + outputs
    count = len(arrays)
    sizes = [(ctypes.c_int64 * a.ndim)(*a.shape) for a in arrays]
    pointer = ctypes.POINTER(ctypes.c_int64)
    code = getattr(ctypes.CDLL(str(library)), name)(
        count,
        (ctypes.c_void_p * count)(*[a.ctypes.data for a in arrays]),
        (ctypes.c_int * count)(*[a.ndim for a in arrays]),
        (pointer * count)(*[ctypes.cast(s, pointer) for s in sizes]),
        (ctypes.c_char_p * count)(*[TYPES[str(a.dtype)] for a in arrays]),
        None,
        None,
    )
    if code:
        raise ArithmeticError(f"{name} returned {code}")
    return outputs


def wrong(library: Path) -> str:
    """Which operation does not compute what it should, or "".  Its work is divided among two threads."""
    ctypes.CDLL(str(library)).Threads(ctypes.c_int64(2))
    for name, (inputs, expected) in examples(np.random.default_rng(0)).items():
        try:
            found = call(library, name.partition(" ")[0], inputs, *(e.shape for e in expected))
        except ArithmeticError as e:
            return str(e)
        for one, right in zip(found, expected, strict=True):
            error = float(np.abs(one - right).max())
            if not error <= TOLERANCE:
                return f"{name} is off by {error:.1e}"
    return ""


def examples(rng: np.random.Generator) -> Examples:
    """Inputs and outputs of every operation, of sizes that leave rests everywhere."""
    tokens, width, ffn, top_k = 19, 75, 53, 2

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    def ints(*values: int) -> Array:
        return np.array(values, np.int32)

    eps = np.full(1, 1e-6, np.float32)
    x, delta, weight = normal(tokens, width), normal(tokens, width), normal(width)
    matrix, both = normal(41, width) / 8, normal(tokens, 2 * ffn)
    ids = rng.integers(0, 41, tokens).astype(np.int32)
    found: Examples = {
        "Product": ([x, matrix], [x @ matrix.T]),
        "Product of few rows": ([x[:3], matrix], [x[:3] @ matrix.T]),
        "Product with bfloat16": ([x, narrow(matrix)], [x @ upcast(narrow(matrix)).T]),
        "Rows": ([matrix, ids], [matrix[ids]]),
        "Norm": ([x, weight, eps], [norm(x, eps) * weight]),
        "AddNorm": ([delta, x, weight, eps], [norm(x + delta, eps) * weight, x + delta]),
        "Swiglu": ([both], [swiglu(both)]),
    }
    heads, kv_heads = 6, 2
    factors = np.repeat(np.array([0.25, 1.0], np.float32), (heads, kv_heads))
    counts, contexts = ints(1, 13, 5), ints(80, 13, 70)
    tables = np.stack([rng.permutation(170)[:80].astype(np.int32) for _ in contexts])
    for dim in (20, 64):  # 64: the way of few queries
        qkv, q_norm, k_norm = normal(tokens, (heads + 2 * kv_heads) * dim), normal(dim), normal(dim)
        cos, sin = normal(tokens, dim), normal(tokens, dim)
        q, k, v = np.split(qkv.reshape(tokens, -1, dim), (heads, heads + kv_heads), 1)
        q, k = rotate(norm(q, eps) * q_norm, cos, sin), rotate(norm(k, eps) * k_norm, cos, sin)
        found[f"SplitHeads of {dim}"] = (
            [qkv, q_norm, k_norm, cos, sin, factors, eps],
            [q * np.float32(0.25), k[:, None], v[:, None]],
        )
        caches = [normal(170, 1, kv_heads, dim) for _ in range(2)]
        expected = attend(q / 8, caches, tables, contexts, counts)
        found[f"Attend of {dim}"] = ([q / 8, *caches, tables, contexts, counts], [expected])
    chosen, start = rng.integers(0, 7, (tokens, top_k)).astype(np.int32), ints(2)
    gate_up, down, shares = normal(3, width, 2 * ffn) / 8, normal(3, ffn, width) / 8, normal(tokens, top_k)
    for name, stored in (("Experts", [gate_up, down]), ("Experts in bfloat16", [narrow(gate_up), narrow(down)])):
        expected = experts(x, shares, chosen - start, *(upcast(a) for a in stored))
        found[name] = ([x, shares, chosen, start, *stored], [expected])
    return found


def narrow(x: Array) -> Array:
    """bfloat16's bits, cut off."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def upcast(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def norm(x: Array, eps: Array) -> Array:
    y: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return y


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    y: Array = x * cos[:, None] + np.roll(x, x.shape[-1] // 2, -1) * sin[:, None]
    return y


def swiglu(x: Array) -> Array:
    gate, up = np.split(x, 2, -1)
    y: Array = gate / (1 + np.exp(-gate)) * up
    return y


def attend(q: Array, caches: list[Array], tables: Array, contexts: Array, counts: Array) -> Array:
    """[T, H*D]: token by token."""
    heads, out, token = q.shape[1], np.empty_like(q), 0
    for table, context, count in zip(tables, contexts, counts, strict=True):
        for seen in range(context - count + 1, context + 1):
            k, v = (np.repeat(c[table[:seen], 0], heads // c.shape[2], 1) for c in caches)
            scores = np.exp(np.einsum("hd,shd->hs", q[token], k))
            out[token] = np.einsum("hs,shd->hd", scores / scores.sum(-1, keepdims=True), v)
            token += 1
    return out.reshape(len(q), -1)


def experts(x: Array, shares: Array, ids: Array, gate_up: Array, down: Array) -> Array:
    out = np.zeros_like(x)
    for t, (row, weights) in enumerate(zip(ids, shares, strict=True)):
        for i, w in zip(row, weights, strict=True):
            if 0 <= i < len(down):
                out[t] += w * (swiglu(x[t] @ gate_up[i]) @ down[i])
    return out


if __name__ == "__main__":
    if problem := wrong(Path(sys.argv[1])):
        sys.exit(problem)

"""What the kernels must compute, in NumPy, and calling a library without MindSpore: a build is tried before it is
used."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Examples = dict[str, tuple[list[Array], list[Array]]]
TOLERANCE = 1e-4
TYPES = {"float32": b"float32", "int32": b"int32", "int8": b"int8", "uint16": b"bfloat16"}
EXACT = (
    "ProductInt8",
    "ProductInt8Static",
    "MlpInt8",
    "AfterAttentionInt8",
    "AttentionInt8",
    "LayerInt8",
)  # the same bits on every machine


def call(library: Path, name: str, inputs: Sequence[Array], *shapes: tuple[int, ...]) -> list[Array]:
    """Run one operation.  uint16 arrays are bfloat16's bits.  Raises ArithmeticError if it refuses."""
    outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
    prepare(library, name, [*inputs, *outputs])()
    return outputs


def prepare(library: Path, name: str, arrays: Sequence[Array]) -> Callable[[], None]:
    """One operation on these inputs, then outputs, to be run any number of times.  Outputs must be contiguous."""
    arrays = [np.ascontiguousarray(a) for a in arrays]
    count = len(arrays)
    sizes = [(ctypes.c_int64 * a.ndim)(*a.shape) for a in arrays]
    pointer = ctypes.POINTER(ctypes.c_int64)
    arguments = (
        (ctypes.c_void_p * count)(*[a.ctypes.data for a in arrays]),
        (ctypes.c_int * count)(*[a.ndim for a in arrays]),
        (pointer * count)(*[ctypes.cast(s, pointer) for s in sizes]),
        (ctypes.c_char_p * count)(*[TYPES[str(a.dtype)] for a in arrays]),
    )
    operation = getattr(ctypes.CDLL(str(library)), name)

    def run(keep: Sequence[Array] = arrays) -> None:
        if code := operation(count, *arguments, None, None):
            raise ArithmeticError(f"{name} returned {code}")

    return run


def wrong(library: Path) -> str:
    """Which operation does not compute what it should, or "".  Its work is divided among two threads."""
    kernels = ctypes.CDLL(str(library))
    kernels.Threads(ctypes.c_int64(2))
    for name, (inputs, expected) in examples(np.random.default_rng(0), bool(kernels.Rounds())).items():
        try:
            found = call(library, name.partition(" ")[0], inputs, *(e.shape for e in expected))
        except ArithmeticError as e:
            return str(e)
        if off := difference(name, found, expected):
            return off
    return ""


def difference(name: str, found: Sequence[Array], expected: Sequence[Array]) -> str:
    """Of an example's outputs from what they should be, or "" within the tolerance."""
    for one, right in zip(found, expected, strict=True):
        error = float(np.abs(one - right).max())
        if not error <= TOLERANCE or (name.startswith(EXACT) and error):
            return f"{name} is off by {error:.1e}"
    return ""


def examples(rng: np.random.Generator, rounds: bool = False) -> Examples:
    """Inputs and outputs of every operation, of sizes that leave rests everywhere.  `rounds`: of kernels that do,
    of many rows, to bfloat16."""
    tokens, width, ffn, top_k = 19, 75, 53, 2

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    def ints(*values: int) -> Array:
        return np.array(values, np.int32)

    eps = np.full(1, 1e-6, np.float32)
    x, delta, weight = normal(tokens, width), normal(tokens, width), normal(width)
    matrix, both, many = normal(41, width) / 8, normal(tokens, 2 * ffn), normal(70, width)
    long = normal(49, 1100)
    wide, tall = normal(150, 1100) / 32, normal(70, 1100) / 32
    ids = rng.integers(0, 41, tokens).astype(np.int32)
    found: Examples = {
        "Product": ([x, matrix], [x @ matrix.T]),
        "Product of few rows": ([x[:3], matrix], [x[:3] @ matrix.T]),
        "Product with bfloat16": ([x, narrow(matrix)], [x @ upcast(narrow(matrix)).T]),
        "Product of many rows": ([many, matrix], [many @ matrix.T]),
        "Product of some long rows": ([long[:8], wide], [long[:8] @ wide.T]),  # divided among two threads
        "Product of some long rows with bfloat16": (
            [long[:19], narrow(wide)],
            [long[:19] @ upcast(narrow(wide)).T],
        ),
        "Product of many long rows": ([long, tall], [long @ tall.T]),
        "Product of many long rows with bfloat16": (
            [long, narrow(tall)],
            [(rounded(long) if rounds else long) @ upcast(narrow(tall)).T],
        ),
        "Rows": ([matrix, ids], [matrix[ids]]),
        "Norm": ([x, weight, eps], [norm(x, eps) * weight]),
        "AddNorm": ([delta, x, weight, eps], [norm(x + delta, eps) * weight, x + delta]),
        "Swiglu": ([both], [swiglu(both)]),
    }
    counts, contexts = ints(1, 13, 5), ints(80, 13, 70)
    tables = np.stack([rng.permutation(170)[:80].astype(np.int32) for _ in contexts])
    # from 64: the way of few queries, a head at a time and three
    for dim, kv_heads in ((20, 2), (40, 2), (64, 2), (128, 6)):
        heads = 3 * kv_heads
        factors = np.repeat(np.array([0.25, 1.0], np.float32), (heads, kv_heads))
        qkv, q_norm, k_norm = normal(tokens, (heads + 2 * kv_heads) * dim), normal(dim), normal(dim)
        cos, sin = normal(tokens, dim), normal(tokens, dim)
        inputs = [qkv, q_norm, k_norm, cos, sin, factors, eps]
        found[f"SplitHeads of {dim}"] = (inputs, split_heads(*inputs))
        q = split_heads(*inputs)[0]
        caches = [normal(170, 1, kv_heads, dim) for _ in range(2)]
        expected = attend(q / 2, caches, tables, contexts, counts)
        found[f"Attend of {dim}"] = ([q / 2, *caches, tables, contexts, counts], [expected])
    found |= examples_of_layers(rng, tables, contexts, counts)
    chosen, start = rng.integers(0, 7, (tokens, top_k)).astype(np.int32), ints(2)
    gate_up, down, shares = normal(3, width, 2 * ffn) / 8, normal(3, ffn, width) / 8, normal(tokens, top_k)
    for name, stored in (("Experts", [gate_up, down]), ("Experts in bfloat16", [narrow(gate_up), narrow(down)])):
        expected = experts(x, shares, chosen - start, *(upcast(a) for a in stored))
        found[name] = ([x, shares, chosen, start, *stored], [expected])
    return found | examples_of_int8(rng)


def examples_of_layers(rng: np.random.Generator, tables: Array, contexts: Array, counts: Array) -> Examples:
    """Of operations that are a layer, or half of one: for a batch, and for the one token of its first sequence."""
    heads, kv_heads, dim, width, ffn = 4, 2, 20, 75, 53

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    qkv, o = normal((heads + 2 * kv_heads) * dim, width) / 8, normal(width, heads * dim) / 8
    mlp, bias = [normal(2 * ffn, width) / 8, normal(width, ffn) / 8], normal(len(qkv))
    factors = np.repeat(np.array([0.25, 1.0], np.float32), (heads, kv_heads))
    slots = np.concatenate([row[n - new : n] for row, n, new in zip(tables, contexts, counts, strict=True)])
    norms, eps = [normal(width), normal(width)], np.full(1, 1e-6, np.float32)
    found: Examples = {}
    for title, sequences, stored in (("", 3, False), (" of one token in bfloat16", 1, True)):
        tokens = int(counts[:sequences].sum())
        of_batch = [slots[:tokens], tables[:sequences], contexts[:sequences], counts[:sequences]]
        matrices = [narrow(m) if stored else m for m in (qkv, o, *mlp)]
        h, x, angles = normal(tokens, width), normal(tokens, width), [normal(tokens, dim), normal(tokens, dim)]
        shift = bias if sequences > 1 else np.zeros(1, np.float32)
        caches = [normal(170, 1, kv_heads, dim) for _ in range(2)]  # each run writes the same to them
        of_heads = [h, matrices[0], shift, normal(dim), normal(dim), *angles, factors, eps]
        inputs = [*of_heads, *caches, *of_batch, matrices[1]]
        whole = [*inputs, x, norms[0], *matrices[2:], norms[1]]
        found["Attention" + title] = (inputs, [attention(*inputs)])
        found["Layer" + title] = (whole, list(layer(*whole)))
        found["Mlp" + title] = ([h, *matrices[2:]], [mlp_of_values(h, *matrices[2:])])
    return found


def examples_of_int8(rng: np.random.Generator) -> Examples:
    """Of operations on int8 weights, whose results are sums of whole numbers: no tolerance hides a wrong code."""
    tokens, width, ffn, top_k = 19, 139, 53, 2

    def codes(*shape: int) -> Array:
        return rng.integers(-128, 128, shape).astype(np.int8)

    def scales(*shape: int) -> Array:
        return rng.uniform(1e-3, 2e-3, shape).astype(np.float32)

    x = rng.standard_normal((tokens, width), np.float32)
    x[3] = -0.0
    x[4, 1] = 100.0  # all else are codes of a few
    weight, scale = codes(41, width), scales(41, 1)
    found: Examples = {}
    for title, rows in (("", x), (" of few rows", x[:5])):
        found["ProductInt8" + title] = ([rows, weight, scale], [product_int8(rows, weight, scale)])
        inputs = [scale[:, 0], rng.integers(-9999, 9999, 41).astype(np.int32)]
        inputs += [np.full(1, 0.02, np.float32), np.full(1, -7, np.float32)]
        static = product_int8_static(rows, weight, *inputs)
        found["ProductInt8Static" + title] = ([rows, weight, *inputs], [static])
    # gates so large that silu of one is itself, in whatever way e^-x is computed: codes are the same everywhere
    x, start = np.abs(x) + np.float32(0.5), np.full(1, 2, np.int32)
    gate_up, down = codes(3, width, 2 * ffn), codes(3, ffn, width)
    gate_up[:, :, :ffn] = np.abs(gate_up[:, :, :ffn] // 2) + 40
    one = [
        a.T for a in (gate_up[0], scales(1, 2 * ffn) * np.float32(4), down[0], scales(1, width) / np.float32(64))
    ]
    found["MlpInt8"] = ([x, *one], [mlp_int8(x, *one)])
    found |= examples_of_whole_layers(rng, x, one)
    shares = rng.uniform(1e-4, 1e-3, (tokens, top_k)).astype(np.float32)
    chosen = rng.integers(0, 7, (tokens, top_k)).astype(np.int32)
    weights = [gate_up, scales(3, 1, 2 * ffn) * np.float32(4), down, scales(3, 1, width)]
    found["ExpertsInt8"] = (
        [x, shares, chosen, start, *weights],
        [experts_int8(x, shares, chosen - start, *weights)],
    )
    return found


def examples_of_whole_layers(rng: np.random.Generator, x: Array, mlp: list[Array]) -> Examples:
    """What is on either side of attention, its products included.  x [T, width], positive; `mlp`: MlpInt8's."""
    (tokens, width), dim, heads, kv_heads, depth = x.shape, 20, 3, 2, 77
    eps = np.full(1, 1e-6, np.float32)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    def matrix(rows: int, columns: int) -> list[Array]:
        scales = rng.uniform(1e-3, 2e-3, (rows, 1)).astype(np.float32)
        return [rng.integers(-128, 128, (rows, columns)).astype(np.int8), scales]

    qkv = matrix((heads + 2 * kv_heads) * dim, width)
    rest = [normal(dim), normal(dim), normal(tokens, dim), normal(tokens, dim), normal(heads + kv_heads), eps]
    found = {"HeadsInt8": ([x, *qkv, *rest], split_heads(product_int8(x, *qkv), *rest))}
    # so large an eps that each norm's factor is 2**-20 in whatever order it sums: codes are the same everywhere
    eps, o = np.full(1, 2.0**40, np.float32), matrix(width, depth)
    o[1] /= np.float32(64)
    gate_up, scale, *down = mlp
    inputs = [normal(tokens, depth), x, *o, rng.uniform(0.5, 1, width).astype(np.float32)]
    inputs += [gate_up, scale * np.float32(2.0**22), *down, normal(width), eps]
    found["AfterAttentionInt8"] = (inputs, list(after_attention_int8(*inputs)))
    # a token that sees itself alone mixes nothing, to the last bit
    heads, slots, one = 4, rng.permutation(tokens).astype(np.int32), np.ones(tokens, np.int32)
    qkv, o = matrix((heads + 2 * kv_heads) * dim, width), matrix(width, heads * dim)
    o[1] /= np.float32(64)
    of_heads = [x, *qkv, normal(len(qkv[0])), normal(dim), normal(dim), normal(tokens, dim), normal(tokens, dim)]
    of_heads += [normal(heads + kv_heads), eps, *(normal(tokens, 1, kv_heads, dim) for _ in range(2))]
    of_attention = [*of_heads, slots, slots[:, None], one, one, *o]
    norms = [rng.uniform(0.5, 1, width).astype(np.float32), normal(width)]
    whole = [*of_attention, x, norms[0], gate_up, scale * np.float32(2.0**22), *down, norms[1]]
    found["AttentionInt8"] = (of_attention, [attention_int8(*of_attention)])
    return found | {"LayerInt8": (whole, list(layer_int8(*whole)))}


def narrow(x: Array) -> Array:
    """bfloat16's bits, cut off."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def rounded(x: Array) -> Array:
    """To the nearest value of bfloat16, of two to that with an even last bit."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)


def upcast(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def norm(x: Array, eps: Array) -> Array:
    y: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return y


def split_heads(
    qkv: Array, q_norm: Array, k_norm: Array, cos: Array, sin: Array, factors: Array, eps: Array
) -> list[Array]:
    """q [T, H, D], k and v [T, 1, K, D]."""
    parts = qkv.reshape(len(qkv), -1, len(q_norm))
    kv_heads = parts.shape[1] - len(factors)
    heads = len(factors) - kv_heads
    q, k, v = np.split(parts, (heads, heads + kv_heads), 1)
    q, k = rotate(norm(q, eps) * q_norm, cos, sin), rotate(norm(k, eps) * k_norm, cos, sin)
    return [q * factors[:heads, None], (k * factors[heads:, None])[:, None], v[:, None]]


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


def mlp_of_values(x: Array, gate_up: Array, down: Array) -> Array:
    y: Array = swiglu(x @ upcast(gate_up).T) @ upcast(down).T
    return y


def attention(h: Array, qkv: Array, bias: Array, *rest: Array) -> Array:
    """[T, width].  Leaves the caches as they are."""
    *of_mixed, o = rest
    y: Array = mixed_heads(h @ upcast(qkv).T + bias, *of_mixed) @ upcast(o).T
    return y


def mixed_heads(qkv: Array, *rest: Array) -> Array:
    """[T, H*D].  Leaves the caches as they are."""
    *of_heads, k_cache, v_cache, slots, tables, contexts, counts = rest
    q, k, v = split_heads(qkv, *of_heads)
    caches = [k_cache.copy(), v_cache.copy()]
    caches[0][slots], caches[1][slots] = k, v
    return attend(q, caches, tables, contexts, counts)


def attention_int8(h: Array, qkv: Array, scale: Array, bias: Array, *rest: Array) -> Array:
    *of_mixed, o, o_scale = rest
    return product_int8(mixed_heads(product_int8(h, qkv, scale) + bias, *of_mixed), o, o_scale)


def layer_int8(*inputs: Array) -> tuple[Array, Array]:
    """h and total, [T, width]."""
    *of_attention, x, weight, gate_up, gate_up_scale, down, down_scale, next_weight = inputs
    eps = of_attention[9]
    total = attention_int8(*of_attention) + x
    total = mlp_int8(norm(total, eps) * weight, gate_up, gate_up_scale, down, down_scale) + total
    return norm(total, eps) * next_weight, total


def layer(*inputs: Array) -> tuple[Array, Array]:
    """h and total, [T, width]: as the kernel promises."""
    *of_attention, x, weight, gate_up, down, next_weight = inputs
    eps = of_attention[8]
    total = attention(*of_attention) + x
    total = mlp_of_values(norm(total, eps) * weight, gate_up, down) + total
    return norm(total, eps) * next_weight, total


def experts(x: Array, shares: Array, ids: Array, gate_up: Array, down: Array) -> Array:
    out = np.zeros_like(x)
    for t, (row, weights) in enumerate(zip(ids, shares, strict=True)):
        for i, w in zip(row, weights, strict=True):
            if 0 <= i < len(down):
                out[t] += w * (swiglu(x[t] @ gate_up[i]) @ down[i])
    return out


def codes_by_token(x: Array) -> tuple[Array, Array]:
    """Codes [T, K] and their scales [T, 1]: max|row| / 127, and rounded half to even."""
    t = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    quotients = np.divide(x, t, out=np.zeros_like(x), where=t > 0)
    return np.clip(np.rint(quotients), -127, 127).astype(np.int8), t


def codes_by_input(x: Array, scale: Array, offset: Array) -> Array:
    codes: Array = np.clip(np.rint(x * (np.float32(1) / scale) + offset), -128, 127).astype(np.int8)
    return codes


def product_int8(x: Array, weight: Array, scale: Array) -> Array:
    """weight [O, K], scale [O, 1] -> [T, O]."""
    codes, t = codes_by_token(x)
    sums = codes.astype(np.int32) @ weight.T.astype(np.int32)
    y: Array = sums.astype(np.float32) * scale[:, 0] * t
    return y


def product_int8_static(
    x: Array, weight: Array, deq_scale: Array, quant_bias: Array, input_scale: Array, input_offset: Array
) -> Array:
    codes = codes_by_input(x, input_scale, input_offset)
    sums = codes.astype(np.int32) @ weight.T.astype(np.int32) + quant_bias
    y: Array = sums.astype(np.float32) * deq_scale
    return y


def mlp_int8(x: Array, gate_up: Array, gate_up_scale: Array, down: Array, down_scale: Array) -> Array:
    return product_int8(swiglu(product_int8(x, gate_up, gate_up_scale)), down, down_scale)


def after_attention_int8(
    mixed: Array, x: Array, o: Array, o_scale: Array, weight: Array, *rest: Array
) -> tuple[Array, Array]:
    """h and total, [T, width]: as the kernel promises."""
    *mlp, next_weight, eps = rest
    total = product_int8(mixed, o, o_scale) + x
    total = mlp_int8(norm(total, eps) * weight, *mlp) + total
    return norm(total, eps) * next_weight, total


def experts_int8(
    x: Array, shares: Array, ids: Array, gate_up: Array, gate_up_scale: Array, down: Array, down_scale: Array
) -> Array:
    """gate_up [E, K, N], gate_up_scale [E, 1, N]."""
    out = np.zeros_like(x)
    for e in range(len(down)):
        tokens, places = np.nonzero(ids == e)
        if len(tokens):
            y = mlp_int8(x[tokens], *(a[e].T for a in (gate_up, gate_up_scale, down, down_scale)))
            np.add.at(out, tokens, y * shares[tokens, places, None])
    return out


if __name__ == "__main__":
    if problem := wrong(Path(sys.argv[1])):
        sys.exit(problem)

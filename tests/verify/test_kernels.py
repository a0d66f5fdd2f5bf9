"""What the interpreter's kernels compute, against plain loops in float64, numpy, and MindSpore on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from msconv.mindir.kernels import Context
from tests.verify.kernel_calls import CLOSE, EXACT, EXACT_HALF, ROUNDED, Array, call, close, ints, random


def attend(q: Array, k: Array, v: Array, scale: float, seen: Callable[[int, int], float]) -> Array:
    """One sequence: q [n, H, D], k and v [m, K, D]; seen(i, j) is added to the score of key j for query i."""
    out = np.zeros((len(q), q.shape[1], v.shape[2]))
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        for h in range(q.shape[1]):
            keys, values = k[:, h // group].astype(np.float64), v[:, h // group].astype(np.float64)
            scores = keys @ q[i, h].astype(np.float64) * scale
            scores += np.array([seen(i, j) for j in range(len(k))])
            shares = np.exp(scores - scores.max())
            out[i, h] = shares @ values / shares.sum()
    return out.reshape(len(q), -1)


def causal(offset: int = 0) -> Callable[[int, int], float]:
    return lambda i, j: 0.0 if j <= i + offset else -np.inf


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    x, weight, eps = random(3, 7), random(7, seed=1), 0.5
    normed, scale = call("RmsNorm", x, weight, eps)
    f = x.double().numpy()
    for row in range(3):
        root = math.sqrt(sum(v * v for v in f[row]) / 7 + eps)
        close(normed[row], f[row] / root * weight.double().numpy())
        assert abs(float(scale[row]) - 1 / root) < CLOSE


def test_rms_norm_rounds_once() -> None:
    x, weight = random(5, 64).bfloat16(), random(64, seed=1).bfloat16()
    normed, _ = call("RmsNorm", x, weight, 1e-6, context=ROUNDED)
    f = x.double()
    once = f / (f.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert normed.dtype == torch.bfloat16
    assert float((normed.double() - once).abs().max()) <= 2**-8 * float(once.abs().max())
    assert float((normed != once.bfloat16()).float().mean()) < 0.02  # float32 inside: ties only


def test_add_rms_norm_gives_the_norm_and_the_sum() -> None:
    x, y, weight = random(2, 8), random(2, 8, seed=1), random(8, seed=2)
    normed, _, total = call("AddRmsNorm", x, y, weight, 1e-6)
    f = x.double().numpy() + y.double().numpy()
    close(total, f)
    close(normed, f / np.sqrt((f * f).mean(-1, keepdims=True) + 1e-6) * weight.double().numpy())


def test_add_rms_norm_norms_the_rounded_sum() -> None:
    x, y = torch.full((1, 2), 256.0).bfloat16(), torch.tensor([[1.0, 0.0]]).bfloat16()  # 257 is no bfloat16
    normed, _, total = call("AddRmsNorm", x, y, torch.ones(2).bfloat16(), 0.0, context=ROUNDED)
    assert total.tolist() == [[256.0, 256.0]]
    assert normed.tolist() == [[1.0, 1.0]]


def test_swiglu_takes_silu_of_the_first_half() -> None:
    x = random(3, 10) * 4
    found = call("Swiglu", x, -1)
    for row, of_row in enumerate(x.double().tolist()):
        close(found[row], [g / (1 + math.exp(-g)) * up for g, up in zip(of_row[:5], of_row[5:], strict=True)])


def test_swiglu_rounds_once_and_its_parts_twice() -> None:
    x = (random(40, 64) * 4).bfloat16()
    found = call("Swiglu", x, 1, context=ROUNDED)
    gate, up = x.double().chunk(2, -1)
    once = (gate / (1 + (-gate).exp()) * up).bfloat16()
    assert found.dtype == torch.bfloat16
    assert float((found != once).float().mean()) < 0.002  # float32 inside: ties only
    twice = call("Mul", call("SiLU", x[:, :32], context=ROUNDED), x[:, 32:], context=ROUNDED)
    assert float((twice != once).float().mean()) > 0.1


@pytest.mark.parametrize(("width", "dim"), [(8, 0), (7, -1), (8, -2)])
def test_swiglu_takes_halves_of_the_last_dimension_only(width: int, dim: int) -> None:
    with pytest.raises(ValueError, match="Swiglu: dim"):
        call("Swiglu", random(4, width), dim)


def test_rotation_turns_the_two_halves_of_each_head() -> None:
    tokens, dim = 5, 6
    q, k = random(tokens, 3 * dim), random(tokens, dim, seed=1)
    angle = np.random.default_rng(2).uniform(0, 6, (tokens, dim // 2))
    table = np.concatenate([angle, angle], 1)
    cos, sin = (torch.from_numpy(f(table)).float() for f in (np.cos, np.sin))
    turned = call("ApplyRotaryPosEmb", q, k, cos, sin, ints(5), 2)
    for x, found in zip((q, k), turned, strict=True):
        heads = x.double().numpy().reshape(tokens, -1, dim)
        expected = np.zeros_like(heads)
        for t in range(tokens):
            for h in range(heads.shape[1]):
                for i in range(dim // 2):
                    point = complex(heads[t, h, i], heads[t, h, i + dim // 2]) * np.exp(1j * angle[t, i])
                    expected[t, h, i], expected[t, h, i + dim // 2] = point.real, point.imag
        close(found, expected.reshape(tokens, -1))


def test_rotation_takes_a_row_a_token_and_no_other_form() -> None:
    q, table = random(4, 8), random(4, 8)
    for rows, form in ((3, 2), (5, 2), (4, 0), (4, 1), (4, 3)):
        cos = random(rows, 8)
        with pytest.raises(ValueError, match="ApplyRotaryPosEmb"):
            call("ApplyRotaryPosEmb", q, table, cos, cos, ints(4), form)


def test_rows_are_cached_in_place_at_their_slots() -> None:
    k, v = random(4, 2 * 3), random(4, 2 * 3, seed=1)
    k_cache, v_cache = torch.zeros(3, 4, 2, 3), torch.zeros(3, 4, 2, 3)
    slots = [9, 0, -1, 7]
    call("ReshapeAndCache", k, v, k_cache, v_cache, ints(*slots))
    for rows, cache in ((k, k_cache), (v, v_cache)):
        expected = np.zeros((3, 4, 2, 3))
        for row, slot in enumerate(slots):
            if slot >= 0:
                expected[slot // 4, slot % 4] = rows[row].double().numpy().reshape(2, 3)
        close(cache, expected)


def test_a_slot_past_the_cache_is_an_error() -> None:
    cache = torch.zeros(2, 4, 1, 2)
    with pytest.raises(IndexError, match="slot 8 of 8"):
        call("ReshapeAndCache", random(1, 2), random(1, 2), cache, cache.clone(), ints(8))


def flash_inputs(lengths: list[int], heads: int, kv_heads: int, dim: int, mask: torch.Tensor) -> list[Any]:
    q, k, v = (random(sum(lengths), n * dim, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    rest = [None, None, None, mask, None, tuple(lengths), tuple(lengths)]
    return [q, k, v, *rest, heads, 1.0, 0.3, 2**31 - 1, 0, 0, 5, 0]


def plain_flash(inputs: list[Any], seen: Callable[[int, int], float]) -> Array:
    """Sequence by sequence in float64."""
    heads, scale, lengths = inputs[10], inputs[12], inputs[8]
    dim = inputs[0].shape[1] // heads
    q, k, v = (x.numpy().reshape(len(x), -1, dim) for x in inputs[:3])
    out, begin = [], 0
    for n in lengths:
        rows = slice(begin, begin + n)
        out.append(attend(q[rows], k[rows], v[rows], scale, seen))
        begin += n
    return np.concatenate(out)


ONES = torch.triu(torch.ones(128, 128), 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("context", "mask"), [(EXACT, ONES), (EXACT_HALF, ONES * -10000.0)], ids=["bf16", "fp16"])
def test_flash_attention_is_causal_within_and_across_tiles(
    context: Context, mask: torch.Tensor, heads: int, kv_heads: int
) -> None:
    inputs = flash_inputs([1, 130, 5, 128, 300], heads, kv_heads, 4, mask)
    close(call("FlashAttentionScore", *inputs, context=context)[3], plain_flash(inputs, causal()))


def test_a_flash_mask_of_zeros_shows_the_future_within_a_tile() -> None:
    inputs = flash_inputs([5, 200], 2, 1, 4, torch.zeros(128, 128))
    found = call("FlashAttentionScore", *inputs)[3]
    close(found, plain_flash(inputs, lambda i, j: 0.0 if j // 128 <= i // 128 else -np.inf))
    assert float((found - torch.from_numpy(plain_flash(inputs, causal()))).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("context", "mask", "added"),
    [
        (EXACT, ONES * -1e-3, 10.0),
        (EXACT_HALF, ONES * 10.0, 10.0),
        (EXACT_HALF, ONES, 1.0),
        (EXACT, ONES * 1e-4, -1.0),
    ],
    ids=["bf16 sign", "fp16 sign", "fp16 given ones", "bf16 given little"],
)
def test_flash_attention_adds_what_the_mask_holds(context: Context, mask: torch.Tensor, added: float) -> None:
    inputs = flash_inputs([40], 2, 1, 4, mask)
    found = call("FlashAttentionScore", *inputs, context=context)[3]
    close(found, plain_flash(inputs, lambda i, j: 0.0 if j <= i else added))


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (3, torch.zeros(1)),  # real_shift
        (4, torch.zeros(1)),  # drop_mask
        (5, torch.zeros(1)),  # padding_mask
        (7, (0,)),  # prefix
        (8, (4, 4)),  # lengths that are not all tokens
        (8, (6, 3)),  # queries that are not the keys
        (11, 0.9),  # keep_prob
        (13, 3),  # pre_tokens: a window
        (14, 1),  # next_tokens
        (15, 1),  # inner_precise
        (16, 0),  # input_layout
        (17, 2),  # sparse_mode
        (6, torch.triu(torch.ones(9, 9), 1)),  # a mask that is not one tile
        (6, torch.triu(torch.ones(300, 300), 1)),
    ],
    ids=lambda value: str(value)[:12],
)
def test_flash_attention_refuses_what_it_does_not_know(index: int, value: Any) -> None:
    inputs = flash_inputs([4, 5], 2, 1, 4, ONES)
    call("FlashAttentionScore", *inputs)
    inputs[index] = value
    with pytest.raises((ValueError, IndexError)):
        call("FlashAttentionScore", *inputs)


def paged_inputs(contexts: list[int], q_lens: list[int], mask: torch.Tensor) -> list[Any]:
    """4 query and 2 key heads of 3; pages of 4, given out backwards, unused table entries out of range."""
    page, pages = 4, sum(-(-c // 4) for c in contexts) + 1
    tables = np.full((len(contexts), max(-(-c // page) for c in contexts)), 10**6, np.int32)
    free = list(range(pages))
    for row, c in zip(tables, contexts, strict=True):
        for i in range(-(-c // page)):
            row[i] = free.pop()
    q = random(sum(q_lens), 4 * 3)
    k, v = random(pages, page, 2, 3, seed=1), random(pages, page, 2, 3, seed=2)
    lengths = [ints(*contexts), None, None, mask, ints(*q_lens)]
    return [q, k, v, torch.from_numpy(tables), *lengths, None, 4, 0.4, 2, 0, 0, 0]


def plain_paged(inputs: list[Any], seen: Callable[[int, int, int], float]) -> Array:
    """seen(row of q, new token i of its sequence counted from the context's beginning, key j)."""
    q, k_cache, v_cache, tables, contexts, _, _, _, q_lens = inputs[:9]
    out, begin = [], 0
    for b, (context, n) in enumerate(zip(contexts.tolist(), q_lens.tolist(), strict=True)):
        places = [(int(tables[b, j // 4]), j % 4) for j in range(context)]
        k = np.stack([k_cache[p].numpy() for p in places])
        v = np.stack([v_cache[p].numpy() for p in places])
        rows = q[begin : begin + n].numpy().reshape(n, 4, 3)

        def added(i: int, j: int, first: int = begin, past: int = context - n) -> float:
            return seen(first + i, past + i, j)

        out.append(attend(rows, k, v, 0.4, added))
        begin += n
    return np.concatenate(out)


def test_paged_attention_of_single_tokens_sees_all_that_is_cached() -> None:
    inputs = paged_inputs([1, 4, 5, 11], [1, 1, 1, 1], torch.zeros(1, 1))
    close(call("PagedAttention", *inputs), plain_paged(inputs, lambda row, i, j: 0.0))


def rows_mask(contexts: list[int], q_lens: list[int]) -> torch.Tensor:
    rows = [c - n + i for c, n in zip(contexts, q_lens, strict=True) for i in range(n)]
    return (torch.arange(max(contexts))[None] > torch.tensor(rows)[:, None]) * -10000.0


@pytest.mark.parametrize(("contexts", "q_lens"), [([3, 9, 1, 16], [3, 2, 1, 5]), ([140], [135]), ([7, 7], [1, 4])])
def test_paged_attention_of_several_tokens_takes_a_mask_row_each(contexts: list[int], q_lens: list[int]) -> None:
    inputs = paged_inputs(contexts, q_lens, rows_mask(contexts, q_lens))
    close(call("PagedAttention", *inputs), plain_paged(inputs, lambda row, i, j: 0.0 if j <= i else -np.inf))


@pytest.mark.parametrize("factor", [0.0, -1e-3, 1e-4])
def test_paged_attention_obeys_its_mask_whatever_it_holds(factor: float) -> None:
    contexts, q_lens = [6, 9], [4, 2]
    mask = rows_mask(contexts, q_lens) * factor
    inputs = paged_inputs(contexts, q_lens, mask)
    close(call("PagedAttention", *inputs), plain_paged(inputs, lambda row, i, j: float(mask[row, j])))


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (5, torch.ones(1)),  # antiquant_scale
        (6, torch.ones(1)),  # antiquant_offset
        (8, ints(1, 1)),  # lengths that are not all tokens
        (9, torch.ones(1)),  # alibi_mask
        (13, 1),  # kv_cache_quant_mode
        (14, 1),  # mask_mode
        (15, 99),  # mla_v_dim, wider than the keys
        (3, ints(99, 99, 99).reshape(1, 3).repeat(2, 1)),  # pages that are not there
        (7, torch.zeros(6, 2)),  # a mask narrower than the context
        (7, torch.zeros(3, 9)),  # fewer rows than tokens
    ],
    ids=lambda value: str(value)[:12],
)
def test_paged_attention_refuses_what_it_does_not_know(index: int, value: Any) -> None:
    inputs = paged_inputs([6, 9], [4, 2], rows_mask([6, 9], [4, 2]))
    call("PagedAttention", *inputs)
    inputs[index] = value
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        call("PagedAttention", *inputs)


# Plain primitives, against MindSpore's own kernels on the CPU: (kind, inputs, MindSpore's call).
X = random(4, 6, 3).numpy()
MATRIX = random(5, 3, seed=1).numpy()
COUNTS = np.array([3, 1, 4, 1, 5], np.int32)
INDEX = np.array([[2, 0], [1, 2]], np.int32)
NEGATIVE = np.array([-7, -4, -1, 0, 5], np.int32)


def cases() -> dict[str, tuple[str, tuple[Any, ...], Callable[[Any, Any], Any]]]:
    """The call gets mindspore.ops and a function that makes its tensors."""
    return {
        **{
            f"Gather, axis {a}": ("Gather", (X, INDEX, a, 0), lambda o, t, a=a: o.gather(t(X), t(INDEX), a))
            for a in (0, 1, 2, -1)
        },
        **{f"Split, axis {a}": ("Split", (X, a, 3), lambda o, t, a=a: o.Split(a, 3)(t(X))) for a in (1, 2, -1)},
        "SplitWithSize": (
            "SplitWithSize",
            (X, (1, 3, 2), 1),
            lambda o, t: o.split(t(X), (1, 3, 2), 1),
        ),
        **{
            f"StridedSlice, masks {b} and {e}": (
                "StridedSlice",
                (X, (1, 2, 0), (3, 5, 2), (1, 2, 1), b, e, 0, 0, 0),
                lambda o, t, b=b, e=e: o.StridedSlice(b, e, 0, 0, 0)(t(X), (1, 2, 0), (3, 5, 2), (1, 2, 1)),
            )
            for b, e in ((0, 0), (1, 0), (0, 1), (3, 1), (2, 6), (7, 7))
        },
        "StridedSlice, from the end": (
            "StridedSlice",
            (X, (-3, -4, 0), (-1, 6, 3), (1, 1, 1), 0, 0, 0, 0, 0),
            lambda o, t: o.StridedSlice()(t(X), (-3, -4, 0), (-1, 6, 3), (1, 1, 1)),
        ),
        "StridedSlice, of fewer dimensions": (
            "StridedSlice",
            (X, (1,), (3,), (1,), 0, 0, 0, 0, 0),
            lambda o, t: o.StridedSlice()(t(X), (1,), (3,), (1,)),
        ),
        **{
            f"CumSum, axis {a}": ("CumSum", (MATRIX, a, False, False), lambda o, t, a=a: o.CumSum()(t(MATRIX), a))
            for a in (0, 1, -1)
        },
        "CumSum of lengths": ("CumSum", (COUNTS, 0, False, False), lambda o, t: o.CumSum()(t(COUNTS), 0)),
        "Range": (
            "Range",
            tuple(np.array(v, np.int32) for v in (2, 11, 3)),
            lambda o, t: o.Range()(*(t(np.array(v, np.int32)) for v in (2, 11, 3))),
        ),
        "Range of scalars": ("Range", (0, 5, 1), lambda o, t: o.arange(0, 5)),
        "Select": (
            "Select",
            (X > 0, X, -2 * X),
            lambda o, t: o.select(t(X > 0), t(X), t(-2 * X)),
        ),
        "Select, broadcast": (
            "Select",
            (MATRIX[:1] > 0, MATRIX, np.float32(-1e30).reshape(())),
            lambda o, t: o.select(t(MATRIX[:1] > 0), t(MATRIX), t(np.float32(-1e30).reshape(()))),
        ),
        "SumExt, one axis": ("SumExt", (X, (1,), False, None), lambda o, t: o.sum(t(X), 1)),
        "SumExt, axes kept": ("SumExt", (X, (0, 2), True, None), lambda o, t: o.sum(t(X), (0, 2), True)),
        "SumExt, all": ("SumExt", (X, None, False, None), lambda o, t: o.sum(t(X))),
        "ReduceMean, kept": ("ReduceMean", (X, (-1,), True), lambda o, t: o.ReduceMean(True)(t(X), -1)),
        "ReduceMean, all": ("ReduceMean", (X, (), False), lambda o, t: o.ReduceMean()(t(X), ())),
        "ReduceMax, all": ("ReduceMax", (X, (), False), lambda o, t: o.ReduceMax()(t(X))),
        "ReduceMax, axes": ("ReduceMax", (X, (0, 1), True), lambda o, t: o.ReduceMax(True)(t(X), (0, 1))),
        "Softmax": ("Softmax", (X, (-2,)), lambda o, t: o.softmax(t(X), -2)),
        "SiLU": ("SiLU", (X,), lambda o, t: o.silu(t(X))),
        "FloorDiv of negatives": ("FloorDiv", (NEGATIVE, 3), lambda o, t: o.floor_div(t(NEGATIVE), 3)),
        "Remainder of negatives": (
            "RemainderTensorScalar",
            (NEGATIVE, 3),
            lambda o, t: t(NEGATIVE) % 3,
        ),
        "Cast to int32": ("Cast", (X * 3, 34), lambda o, t: o.cast(t(X * 3), t(COUNTS).dtype)),
        "Concat": ("Concat", ((X, -X), 1), lambda o, t: o.cat((t(X), t(-X)), 1)),
        "Transpose": ("Transpose", (X, (2, 0, 1)), lambda o, t: o.transpose(t(X), (2, 0, 1))),
        "BroadcastTo": ("BroadcastTo", (MATRIX[0], (2, 3)), lambda o, t: o.broadcast_to(t(MATRIX[0]), (2, 3))),
        "BroadcastTo, -1": (
            "BroadcastTo",
            (MATRIX[:, :1], (-1, 4)),
            lambda o, t: o.broadcast_to(t(MATRIX[:, :1]), (-1, 4)),
        ),
        "ExpandDims": ("ExpandDims", (MATRIX, -1), lambda o, t: o.expand_dims(t(MATRIX), -1)),
        "Minimum": ("Minimum", (COUNTS, 3), lambda o, t: o.minimum(t(COUNTS), 3)),
        "MatMul, transposed": (
            "MatMul",
            (MATRIX, MATRIX, False, True),
            lambda o, t: o.MatMul(transpose_b=True)(t(MATRIX), t(MATRIX)),
        ),
        "MatMul, first transposed": (
            "MatMul",
            (MATRIX, MATRIX, True, False),
            lambda o, t: o.MatMul(transpose_a=True)(t(MATRIX), t(MATRIX)),
        ),
        "BatchMatMul": (
            "BatchMatMul",
            (X, X, False, True),
            lambda o, t: o.BatchMatMul(transpose_b=True)(t(X), t(X)),
        ),
    }


def tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return tuple(map(tensors, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", cases())
def test_a_plain_kernel_computes_what_mindspore_computes(name: str) -> None:
    import mindspore as ms

    kind, inputs, theirs = cases()[name]
    found, expected = call(kind, *map(tensors, inputs)), theirs(ms.ops, ms.Tensor)
    if not isinstance(expected, tuple):
        found, expected = (found,), (expected,)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert str(a.dtype).rpartition(".")[2] == str(b.dtype).lower()
        close(a, b.asnumpy().astype(np.float64))


def test_stack_puts_the_new_dimension_at_its_axis() -> None:
    a, b = random(2, 3), random(2, 3, seed=1)
    for axis in (0, 1, -1):
        assert torch.equal(call("Stack", (a, b), axis=axis, N=2, num=2), torch.stack((a, b), axis))


def test_scatter_writes_rows_in_place() -> None:
    import mindspore as ms

    x, rows = random(9, 1, 2).numpy(), random(5, 1, 2, seed=1).numpy()
    index = np.array([3, 8, 5, 0, 6], np.int32)
    cache = tensors(x)
    assert call("ScatterUpdate", cache, tensors(index), tensors(rows)) is cache
    parameter = ms.Parameter(ms.Tensor(x))
    ms.ops.ScatterUpdate()(parameter, ms.Tensor(index), ms.Tensor(rows))
    close(cache, parameter.asnumpy().astype(np.float64))


@pytest.mark.parametrize("place", [3, -1])
def test_scatter_past_the_end_is_an_error(place: int) -> None:
    with pytest.raises(IndexError, match="ScatterUpdate"):
        call("ScatterUpdate", torch.zeros(3, 4, 2), torch.tensor([place]), random(1, 4, 2))


@pytest.mark.parametrize("index", [-1, 4])
def test_gathering_past_the_end_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="Gather"):
        call("Gather", tensors(X), ints(0, index), 0, 0)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("Gather", (X, INDEX, 1, 1)),
        ("CumSum", (MATRIX, 0, True, False)),
        ("CumSum", (MATRIX, 0, False, True)),
        ("StridedSlice", (X, (0, 0, 0), (2, 2, 2), (1, 1, 1), 0, 0, 1, 0, 0)),
        ("StridedSlice", (X, (0, 0, 0), (2, 2, 2), (1, 1, 1), 0, 0, 0, 1, 0)),
        ("StridedSlice", (X, (0, 0, 0), (2, 2, 2), (1, 1, 1), 0, 0, 0, 0, 1)),
        ("StridedSlice", (X, (2, 0, 0), (0, 2, 2), (-1, 1, 1), 0, 0, 0, 0, 0)),
        ("Split", (X, 0, 3)),  # 4 rows in 3: MindSpore refuses it
        ("Range", (0.5, 3.5, 1.0)),  # of fractions, not of their integers
        ("Cast", (X, 12345)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_value_that_a_kernel_does_not_know_is_an_error(kind: str, inputs: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        call(kind, *map(tensors, inputs))


def test_exact_mode_keeps_float32_where_the_graph_rounds() -> None:
    x = random(64)
    for type_id, dtype in ((45, torch.bfloat16), (42, torch.float16)):
        assert torch.equal(call("Cast", x, type_id), x)
        assert torch.equal(call("Cast", x, type_id, context=Context(False, dtype)), x.to(dtype))


def test_bfloat16_products_are_summed_in_float32() -> None:
    x, y = random(4, 512).bfloat16(), random(4, 512, seed=1).bfloat16()
    found = call("MatMul", x, y, False, True, context=ROUNDED)
    exact = x.double() @ y.double().T
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())

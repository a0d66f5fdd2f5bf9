"""What the interpreter's kernels for experts and latent attention compute, against plain loops and MindSpore."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from msconv.mindir.kernels import KERNELS
from tests.verify.kernel_calls import EXACT, ROUNDED, Array, call, close, ints, random


# FusedAddTopKDiv
def route(
    logits: Array, bias: Array, groups: int, top_groups: int, best: int, count: int, normalise: bool, scale: float
) -> tuple[list[dict[int, float]], list[list[int]]]:
    """Of each token: the weight of each expert, and the experts from the best on."""
    weights, orders = [], []
    for row in logits.tolist():
        scores = [1 / (1 + math.exp(-x)) for x in row]
        choice = [s + float(b) for s, b in zip(scores, bias, strict=True)]
        size = len(row) // groups
        parts = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        sums = [sum(sorted((choice[e] for e in part), reverse=True)[:best]) for part in parts]
        kept = sorted(range(groups), key=lambda g: -sums[g])[:top_groups]
        able = [e for g in kept for e in parts[g]]
        order = sorted(able, key=lambda e: -choice[e])[:count]
        total = sum(scores[e] for e in order) if normalise else 1.0
        weights.append({e: scores[e] / total * scale for e in order})
        orders.append(order)
    return weights, orders


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "best", "count"),
    [(16, 4, 2, 2, 4), (8, 1, 1, 2, 3), (12, 3, 1, 2, 1), (12, 3, 3, 1, 5), (8, 2, 1, 3, 4), (6, 3, 2, 2, 4)],
)
def test_routing_is_of_scores_in_groups(
    experts: int, groups: int, top_groups: int, best: int, count: int, normalise: bool
) -> None:
    logits, bias = random(40, experts), random(experts, seed=1) * 0.5
    settings = (groups, top_groups, best, count, 0, normalise, 1.7, None, None, False)
    weights, ids = call("FusedAddTopKDiv", logits, bias, *settings)
    expected, orders = route(logits.numpy(), bias.numpy(), groups, top_groups, best, count, normalise, 1.7)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert ids.tolist() == orders
    close(weights, [[row[e] for e in order] for row, order in zip(expected, orders, strict=True)])


def test_a_group_of_negative_scores_is_still_a_group() -> None:
    """What is left out is behind all, not a zero among others."""
    bias = torch.full((8,), -3.0)
    weights, ids = call("FusedAddTopKDiv", random(20, 8), bias, 4, 1, 2, 2, 0, True, 1.0, None, None, False)
    assert (ids[:, 0] // 2 == ids[:, 1] // 2).all()
    close(weights.sum(1), np.ones(20))


@pytest.mark.parametrize(
    ("index", "value"),
    [(2, 3), (6, 1), (9, ints(1)), (10, ints(1)), (11, True)],
    ids=["groups", "activation", "table", "numbers", "mapped"],
)
def test_routing_refuses_what_it_does_not_know(index: int, value: Any) -> None:
    inputs: list[Any] = [random(3, 8), random(8), 4, 2, 2, 2, 0, True, 1.0, None, None, False]
    call("FusedAddTopKDiv", *inputs)
    inputs[index] = value
    with pytest.raises((ValueError, RuntimeError)):
        call("FusedAddTopKDiv", *inputs)


# MoeInitRoutingV2, MoeTokenUnpermute
def sort_tokens(ids: Array) -> tuple[list[tuple[int, int]], list[int]]:
    """(token, choice) in the order of experts, tokens and choices; and how many each expert has."""
    flat = [(int(e), t, j) for t, row in enumerate(ids) for j, e in enumerate(row)]
    return [(t, j) for _, t, j in sorted(flat)], [sum(e == x for x, _, _ in flat) for e in range(9)]


IDS = [
    np.random.default_rng(5).integers(0, 9, (7, 3)),
    np.full((5, 2), 8),
    np.zeros((1, 1), np.int64),
    np.array([[8, 0], [0, 8], [3, 3]]),
]


@pytest.mark.parametrize("ids", IDS, ids=["random", "all the last", "one", "two ends"])
@pytest.mark.parametrize("said", [1, 2])
def test_tokens_are_sorted_by_expert(ids: Array, said: int) -> None:
    x = random(len(ids), 4)
    given = torch.from_numpy(ids.astype(np.int32))
    rows, places, groups, again = call("MoeInitRoutingV2", x, given, 0, 0, 9, 0, said, True)
    order, counts = sort_tokens(ids)
    close(rows, [x[t].tolist() for t, _ in order])
    assert places.tolist() == [order.index((t, j)) for t in range(len(ids)) for j in range(ids.shape[1])]
    expected = counts if said == 2 else [sum(counts[: e + 1]) for e in range(9)]
    assert groups.tolist() == expected
    assert groups.dtype == places.dtype == torch.int32
    assert again.tolist() == expected


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (1, ints(0, 9).reshape(1, 2)),
        (1, ints(0, -1).reshape(1, 2)),
        *((2, 1), (3, 1), (5, 1), (6, 0), (6, 3), (7, False)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_sorting_refuses_what_it_does_not_know(index: int, value: Any) -> None:
    inputs: list[Any] = [random(1, 4), ints(0, 8).reshape(1, 2), 0, 0, 9, 0, 2, True]
    call("MoeInitRoutingV2", *inputs)
    inputs[index] = value
    with pytest.raises((ValueError, IndexError)):
        call("MoeInitRoutingV2", *inputs)


@pytest.mark.parametrize("ids", IDS, ids=["random", "all the last", "one", "two ends"])
def test_tokens_come_back_to_their_places(ids: Array) -> None:
    order, _ = sort_tokens(ids)
    y, weights = random(ids.size, 4), random(*ids.shape, seed=1)
    places = ints(*(order.index((t, j)) for t in range(len(ids)) for j in range(ids.shape[1])))
    expected = np.zeros((len(ids), 4))
    for row, (t, j) in enumerate(order):
        expected[t] += y[row].double().numpy() * float(weights[t, j])
    close(call("InnerMoeTokenUnpermute", y, places, weights, False, None), expected)


@pytest.mark.parametrize(
    ("index", "value"),
    [(1, ints(0, 6, 1, 2, 3, 4)), (1, ints(0, -1, 1, 2, 3, 4)), (1, ints(0, 1)), (3, True), (4, (3, 4))],
    ids=["past the end", "before the beginning", "too few", "padded", "restored"],
)
def test_bringing_back_refuses_what_it_does_not_know(index: int, value: Any) -> None:
    inputs: list[Any] = [random(6, 4), ints(5, 4, 3, 2, 1, 0), random(3, 2), False, None]
    call("InnerMoeTokenUnpermute", *inputs)
    inputs[index] = value
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        call("InnerMoeTokenUnpermute", *inputs)


def test_a_row_that_is_not_a_number_is_not_hidden_by_a_weight_of_zero() -> None:
    y = torch.tensor([[1.0], [float("nan")]])
    assert call("InnerMoeTokenUnpermute", y, ints(0, 1), torch.tensor([[1.0, 0.0]]), False, None).isnan().all()


# GroupedMatmulV4
ONE_EACH = (1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)


def grouped(groups: list[int], list_type: int, rows: int = 7, **changes: Any) -> Any:
    inputs: list[Any] = [(random(rows, 3),), (random(4, 3, 2, seed=1),), *[None] * 6, ints(*groups).long()]
    inputs += [None, None, None, 3, 0, list_type, 0, None]
    context = changes.pop("context", EXACT)
    info = changes.pop("group_info", ONE_EACH)
    for index, value in changes.items():
        inputs[int(index[1:])] = value
    (out,) = call("GroupedMatmulV4", *inputs, context=context, group_info=info)
    return out


@pytest.mark.parametrize("counts", [[2, 0, 4, 1], [0, 0, 0, 7], [7, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("list_type", [0, 1])
def test_each_group_is_multiplied_by_its_own_matrix(counts: list[int], list_type: int) -> None:
    x, weight = random(7, 3).double().numpy(), random(4, 3, 2, seed=1).double().numpy()
    found = grouped(list(np.cumsum(counts)) if list_type == 0 else counts, list_type)
    owner = [e for e, n in enumerate(counts) for _ in range(n)]
    for row, expert in enumerate(owner):
        close(found[row], x[row] @ weight[expert])
    assert found[len(owner) :].isnan().all()
    assert found.shape == (7, 2)


@pytest.mark.parametrize(
    "changes",
    [{f"i{i}": random(4)} for i in (2, 3, 4, 5, 6, 7, 9, 10, 11)]
    + [{"i12": 0}, {"i13": -1}, {"i15": 1}, {"i16": (1,)}]
    + [{"group_info": (2, *ONE_EACH[1:])}, {"i0": (random(7, 3), random(7, 3))}],
    ids=lambda c: next(iter(c)),
)
def test_grouped_products_refuse_what_they_do_not_know(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        grouped([2, 0, 4, 1], 1, **changes)


@pytest.mark.parametrize(
    ("groups", "list_type"), [([2, 0, 4, 2], 1), ([2, 2, 4, 8], 0), ([2, 2], 1), ([1] * 5, 1)]
)
def test_groups_that_do_not_fit_are_an_error(groups: list[int], list_type: int) -> None:
    with pytest.raises(ValueError, match="GroupedMatmulV4"):
        grouped(groups, list_type)


def test_grouped_products_are_summed_in_float32_and_rounded_once() -> None:
    x, weight = random(4, 512).bfloat16(), random(2, 512, 3, seed=1).bfloat16()
    inputs = [(x,), (weight,), *[None] * 6, ints(3, 1).long(), None, None, None, 3, 0, 1, 0, None]
    (found,) = call("GroupedMatmulV4", *inputs, context=ROUNDED, group_info=ONE_EACH)
    exact = torch.cat([x[:3].double() @ weight[0].double(), x[3:].double() @ weight[1].double()])
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


# PagedAttention over latents
HEADS, WIDTH, VALUE, PAGE_ROWS = 3, 10, 6, 4


def latent_inputs(contexts: list[int], q_lens: list[int], mask: torch.Tensor) -> list[Any]:
    """One key head; pages given out backwards, unused table entries out of range."""
    pages = sum(-(-c // PAGE_ROWS) for c in contexts) + 1
    tables = np.full((len(contexts), -(-max(contexts) // PAGE_ROWS)), 10**6, np.int32)
    free = list(range(pages))
    for row, c in zip(tables, contexts, strict=True):
        for i in range(-(-c // PAGE_ROWS)):
            row[i] = free.pop()
    cache = random(pages, PAGE_ROWS, 1, WIDTH, seed=1)
    lengths = [ints(*contexts), None, None, mask, ints(*q_lens)]
    q = random(sum(q_lens), HEADS * WIDTH)
    return [q, cache, cache, torch.from_numpy(tables), *lengths, None, HEADS, 0.3, 1, 0, 0, VALUE]


def plain_latent(inputs: list[Any]) -> Array:
    """Each token sees what is before it and itself; values are the keys' first columns."""
    q, cache, _, tables, contexts, _, _, _, q_lens = inputs[:9]
    out, row = [], 0
    for b, (context, n) in enumerate(zip(contexts.tolist(), q_lens.tolist(), strict=True)):
        places = [(int(tables[b, j // PAGE_ROWS]), j % PAGE_ROWS) for j in range(context)]
        keys = np.stack([cache[p][0].double().numpy() for p in places])
        for i in range(n):
            heads = []
            for h in range(HEADS):
                scores = keys @ q[row, h * WIDTH : (h + 1) * WIDTH].double().numpy() * 0.3
                scores[context - n + i + 1 :] = -np.inf
                shares = np.exp(scores - scores.max())
                heads.append(shares @ keys[:, :VALUE] / shares.sum())
            out.append(np.concatenate(heads))
            row += 1
    return np.stack(out)


def rows_mask(contexts: list[int], q_lens: list[int]) -> torch.Tensor:
    rows = [c - n + i for c, n in zip(contexts, q_lens, strict=True) for i in range(n)]
    return (torch.arange(max(contexts))[None] > torch.tensor(rows)[:, None]) * -10000.0


@pytest.mark.parametrize(("contexts", "q_lens"), [([3, 9, 1, 16], [3, 2, 1, 5]), ([4, 4], [1, 4]), ([7], [7])])
def test_values_are_the_first_columns_of_the_keys(contexts: list[int], q_lens: list[int]) -> None:
    inputs = latent_inputs(contexts, q_lens, rows_mask(contexts, q_lens))
    close(call("PagedAttention", *inputs), plain_latent(inputs))


def test_single_tokens_see_all_latents() -> None:
    inputs = latent_inputs([1, 4, 5, 11], [1, 1, 1, 1], torch.zeros(1, 1))
    close(call("PagedAttention", *inputs), plain_latent(inputs))


@pytest.mark.parametrize("width", [WIDTH + 1, -1])
def test_values_wider_than_the_keys_are_an_error(width: int) -> None:
    inputs = latent_inputs([3, 5], [1, 1], torch.zeros(1, 1))
    inputs[15] = width
    with pytest.raises((ValueError, RuntimeError)):
        call("PagedAttention", *inputs)


def test_writing_latents_leaves_the_values_alone() -> None:
    cache, rows = random(3, 4, 1, 5), random(3, 5, seed=1)
    before = cache.clone()
    call("ReshapeAndCache", rows, None, cache, None, ints(9, -1, 2))
    assert torch.equal(cache[2, 1, 0], rows[0])
    assert torch.equal(cache[0, 2, 0], rows[2])
    changed = (cache != before).flatten(1).any(1).tolist()
    assert changed == [True, False, True]
    assert int((cache != before).any(-1).sum()) == 2


# Plain primitives, against MindSpore's own kernels on the CPU.
X = random(4, 6, 3).numpy()
MATRIX = random(5, 3, seed=1).numpy()
ROUGH = np.array([np.nan, np.inf, -np.inf, 2.0], np.float32)
INDEX = np.array([[2, 0], [1, 1], [0, 2], [2, 2], [1, 0]], np.int32)
PLACES = np.array([[4], [0], [4], [2], [4]], np.int32)


def cases() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any], Callable[[Any, Any], Any]]]:
    """(kind, inputs, attributes, the call of mindspore.ops with a function that makes its tensors)."""
    return {
        **{
            f"TopK of {k}": ("TopK", (X, k), {"sorted": True}, lambda o, t, k=k: o.TopK(sorted=True)(t(X), k))
            for k in (1, 2, 3)
        },
        "GatherD, columns": (
            "GatherD",
            (MATRIX, 1, INDEX),
            {},
            lambda o, t: o.gather_elements(t(MATRIX), 1, t(INDEX)),
        ),
        "GatherD, rows": (
            "GatherD",
            (MATRIX, 0, INDEX[:, :1].repeat(3, 1)),
            {},
            lambda o, t: o.gather_elements(t(MATRIX), 0, t(INDEX[:, :1].repeat(3, 1))),
        ),
        "Tile": ("Tile", (X[:, :1], (1, 5, 1)), {}, lambda o, t: o.tile(t(X[:, :1]), (1, 5, 1))),
        "Tile, twice": ("Tile", (MATRIX, (2, 3)), {}, lambda o, t: o.tile(t(MATRIX), (2, 3))),
        "Tile, a new dimension": ("Tile", (MATRIX, (2, 1, 1)), {}, lambda o, t: o.tile(t(MATRIX), (2, 1, 1))),
        "ScatterNd, rows that meet": (
            "ScatterNd",
            (PLACES, MATRIX, (6, 3)),
            {},
            lambda o, t: o.ScatterNd()(t(PLACES), t(MATRIX), (6, 3)),
        ),
        "NanToNum": ("NanToNum", (ROUGH, 0.5, 7.0, -8.0), {}, lambda o, t: o.nan_to_num(t(ROUGH), 0.5, 7.0, -8.0)),
        "NanToNum, zeros": (
            "NanToNum",
            (ROUGH, 0.0, 0.0, 0.0),
            {},
            lambda o, t: o.nan_to_num(t(ROUGH), 0.0, 0.0, 0.0),
        ),
        "Sigmoid": ("Sigmoid", (X * 9,), {}, lambda o, t: o.sigmoid(t(X * 9))),
        "Maximum": ("Maximum", (INDEX, 1), {}, lambda o, t: o.maximum(t(INDEX), 1)),
        "Equal, broadcast": (
            "Equal",
            (INDEX.reshape(-1, 1), np.arange(3, dtype=np.int32)),
            {},
            lambda o, t: t(INDEX.reshape(-1, 1)) == t(np.arange(3, dtype=np.int32)),
        ),
        "Greater": ("Greater", (MATRIX, 0.25), {}, lambda o, t: t(MATRIX) > 0.25),
    }


def tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return tuple(map(tensors, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", cases())
def test_a_plain_kernel_computes_what_mindspore_computes(name: str) -> None:
    import mindspore as ms

    kind, inputs, attributes, theirs = cases()[name]
    found, expected = call(kind, *map(tensors, inputs), **attributes), theirs(ms.ops, ms.Tensor)
    found, expected = (v if isinstance(v, tuple) else (v,) for v in (found, expected))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert str(a.dtype).rpartition(".")[2] == str(b.dtype).lower()
        close(a, b.asnumpy().astype(np.float64))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("largest", [True, False])
def test_the_best_along_an_axis(axis: int, largest: bool) -> None:
    values, index = call("TopkExt", tensors(X), 2, axis, largest, True)
    order = np.argsort(-X if largest else X, axis, kind="stable").take([0, 1], axis)
    assert np.array_equal(index.numpy(), order)
    assert index.dtype == torch.int64
    close(values, np.take_along_axis(X, order, axis))


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("GatherD", (MATRIX, 1, INDEX + 1)),
        ("GatherD", (MATRIX, 1, INDEX - 1)),
        ("ScatterNd", (PLACES, MATRIX, (4, 3))),
        ("ScatterNd", (PLACES - 1, MATRIX, (6, 3))),
        ("ScatterNd", (np.zeros((5, 2), np.int32), MATRIX, (6, 3))),
        ("TopkExt", (X, 7, 1, True, True)),
        ("Tile", (X, (2,))),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_value_that_a_kernel_does_not_know_is_an_error(kind: str, inputs: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        call(kind, *map(tensors, inputs))


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("FusedAddTopKDiv", set()),
        ("MoeInitRoutingV2", set()),
        ("GroupedMatmulV4", {"group_info"}),
        ("InnerMoeTokenUnpermute", set()),
        ("PagedAttention", set()),
        ("TopK", {"sorted"}),
        ("TopkExt", set()),
        ("GatherD", set()),
        ("ScatterNd", set()),
        ("NanToNum", set()),
        ("Tile", set()),
    ],
)
def test_no_other_attribute_is_obeyed(kind: str, attributes: set[str]) -> None:
    """Those that a kernel does not list are refused before it runs."""
    assert KERNELS[kind].attributes == attributes

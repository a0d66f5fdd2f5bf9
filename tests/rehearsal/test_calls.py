"""What one call's inputs must mean: each way in which they can be wrong is told with its place and its numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from msconv.rehearsal.calls import call_problems
from msconv.rehearsal.records import Cache, Call
from msconv_runtime.artifact import Graph, GraphInput
from msconv_runtime.paging import Sequences, attention_mask

PAGE = 16
WIDTH = 8
CACHES = [f"{kind}_cache.{layer}" for layer in range(2) for kind in "kv"]
Change = Callable[[Call], Call]


def graph(role: str, dtype: str = "bfloat16") -> Graph:
    inputs = [GraphInput("attention_mask", dtype, [None, None], "mask")]
    inputs += [GraphInput(name, dtype, [None, None, 2, WIDTH], "cache") for name in CACHES]
    return Graph("ascend910b", role, "", 0, "", "", 0, inputs, [], [])


def call(role: str, cached: list[int], new: list[int], dtype: str = "bfloat16") -> Call:
    """A right call: sequences with so many cached tokens get so many new ones."""
    sequences = Sequences(len(new), PAGE)
    if any(cached):
        sequences.advance([[1] * n for n in cached])
    batch = sequences.advance([[7] * n for n in new])
    names = ("input_ids", "positions", "slots", "block_tables", "context_lens", "q_lens")
    inputs = {name: torch.from_numpy(a.copy()) for name, a in zip(names, batch.arrays, strict=True)}
    hides = 1.0 if dtype == "bfloat16" else -10000.0
    inputs["attention_mask"] = torch.from_numpy(attention_mask(role == "prefill", batch, hides)).to(
        getattr(torch, dtype)
    )
    shape = (sequences.num_pages + 2, PAGE, 2, WIDTH)
    caches = [Cache(shape, 4096 * (i + 1), name.replace("_cache.", " ")) for i, name in enumerate(CACHES)]
    return Call(0, "", caches, inputs, torch.zeros(len(new), 5), {})


PREFILL = call("prefill", [0, 0], [20, 3])
EXTEND = call("decode", [40, 17], [20, 3])
FRESH = call("decode", [0, 0], [20, 3])
DECODE = call("decode", [40, 17, 1], [1, 1, 1])


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda c: replace(c, inputs={**c.inputs, name: edit(c.inputs[name].clone())})


def change_caches(edit: Callable[[list[Cache]], list[Cache]]) -> Change:
    return lambda c: replace(c, caches=edit(list(c.caches)))


def exchanged(a: int, b: int) -> Change:
    def edit(caches: list[Cache]) -> list[Cache]:
        caches[a], caches[b] = caches[b], caches[a]
        return caches

    return change_caches(edit)


copied_pool = change_caches(lambda c: [replace(x, buffer="") for x in c])
cut_pool = change_caches(lambda c: [replace(x, buffer=f"part of {x.buffer}") for x in c])

FAULTS: list[tuple[str, str, Call, Change, str]] = [
    ("slots one too far", "decode", DECODE, change("slots", lambda s: s + 1), "slots: .* of sequence 0; by its"),
    ("slots of nobody", "decode", DECODE, change("slots", lambda s: s - 4096), r"slots: .* of \d+"),
    ("a slot twice", "decode", DECODE, change("slots", lambda s: s[0].expand(3)), "two tokens are written"),
    (
        "positions one too far",
        "decode",
        DECODE,
        change("positions", lambda p: p + 1),
        "positions: 41 of sequence 0",
    ),
    ("positions from 0", "decode", EXTEND, change("positions", lambda p: p - 17), "positions: 23 to 42 of"),
    ("contexts without new tokens", "decode", DECODE, change("context_lens", lambda c: c - 1), "positions: 40 of"),
    ("contexts of new tokens only", "decode", EXTEND, change("context_lens", lambda c: c * 0 + 1), "do not count"),
    ("a token too few", "decode", DECODE, change("q_lens", lambda q: q[:2]), "block_tables: 3 for 2 sequences"),
    ("lengths that sum to more", "decode", DECODE, change("q_lens", lambda q: q + 1), "q_lens: .* for 3 tokens"),
    ("tables of half the pages", "decode", DECODE, change("block_tables", lambda t: t[:, :1]), "1 pages wide"),
    ("tables of another stride", "decode", EXTEND, change("block_tables", lambda t: t * 2), "block_tables|slots"),
    (
        "tables of the next sequence",
        "decode",
        DECODE,
        change("block_tables", lambda t: t.roll(1, 0)),
        "block_tables",
    ),
    ("a page twice", "decode", EXTEND, change("block_tables", lambda t: t[:, :1].expand_as(t)), "a page twice"),
    ("the prefill graph on a prefix", "prefill", EXTEND, lambda c: c, "graph: prefill for sequences with"),
    ("the decode graph without a prefix", "decode", FRESH, lambda c: c, "graph: decode for 2 sequences without"),
    ("a copy of the pool", "decode", DECODE, copied_pool, "k_cache.0: is SGLang's buffer `none`, not `k 0`"),
    ("a part of the pool", "decode", DECODE, cut_pool, "k_cache.0: is SGLang's buffer `part of k 0`"),
    (
        "a mask of zeros for many tokens",
        "decode",
        EXTEND,
        change("attention_mask", torch.zeros_like),
        r"attention_mask: \d+ of \d+ values are wrong",
    ),
    (
        "one zero for many tokens",
        "decode",
        EXTEND,
        change("attention_mask", lambda m: m[:1, :1]),
        r"attention_mask: is \[1, 1\]",
    ),
    ("a mask of the wrong sign", "decode", EXTEND, change("attention_mask", torch.neg), "values are wrong"),
    (
        "a mask with the diagonal",
        "prefill",
        PREFILL,
        change("attention_mask", lambda m: m + m.mT * 0 + torch.eye(128)),
        "wrong",
    ),
    (
        "a mask of the other type",
        "prefill",
        PREFILL,
        change("attention_mask", lambda m: m * -10000),
        "values are wrong",
    ),
    ("keys and values exchanged", "decode", DECODE, exchanged(0, 1), "k_cache.0: is SGLang's buffer `v 0`"),
    ("two layers exchanged", "decode", DECODE, exchanged(0, 2), "k_cache.0: is SGLang's buffer `k 1`"),
    (
        "the same memory twice",
        "decode",
        DECODE,
        change_caches(lambda c: [c[0], c[0], *c[2:]]),
        "two of them are the same memory",
    ),
    (
        "pages of another size",
        "decode",
        DECODE,
        change_caches(lambda c: [replace(x, shape=(x.shape[0] * 2, 8, *x.shape[2:])) for x in c]),
        "SGLang's pages have 16 slots",
    ),
    (
        "heads of another width",
        "decode",
        DECODE,
        change_caches(lambda c: [replace(x, shape=(*x.shape[:3], 4)) for x in c]),
        r"the graph takes \[pages, 16, 2, 8\]",
    ),
    ("a cache too few", "decode", DECODE, change_caches(lambda c: c[:3]), "caches: 3, the graph takes 4"),
]


@pytest.mark.parametrize(("name", "phase", "right", "fault", "told"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_wrong_input_is_told(name: str, phase: str, right: Call, fault: Change, told: str) -> None:
    problems = call_problems(fault(right), graph(phase), PAGE)
    assert problems
    assert re.search(told, problems[0]), problems


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("phase", "cached", "new"),
    [
        ("prefill", [0], [1]),
        ("prefill", [0, 0, 0], [1, 16, 200]),
        ("decode", [1, 15, 16, 17, 160], [1, 1, 1, 1, 1]),
        ("decode", [16, 0, 300], [5, 40, 1]),
    ],
)
def test_what_the_runtime_makes_is_right(phase: str, cached: list[int], new: list[int], dtype: str) -> None:
    assert call_problems(call(phase, cached, new, dtype), graph(phase, dtype), PAGE) == []


def test_random_batches_are_right_and_any_moved_number_is_seen() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        count = int(rng.integers(1, 5))
        cached, new = rng.integers(1, 70, count).tolist(), rng.integers(1, 20, count).tolist()
        right = call("decode", cached, new)
        assert call_problems(right, graph("decode"), PAGE) == []
        name = str(rng.choice(["positions", "slots", "context_lens", "q_lens"]))
        place = int(rng.integers(len(right.inputs[name])))

        def move(values: torch.Tensor, place: int = place) -> torch.Tensor:
            values[place] += 1
            return values

        assert call_problems(change(name, move)(right), graph("decode"), PAGE), (name, place, cached, new)

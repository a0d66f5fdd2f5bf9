"""Every cut is reversible: what all ranks get, put together, is the source, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from msconv.layout.cuts import (
    COLS,
    COPY,
    HEAD_COLS,
    HEADS,
    KV_HEADS,
    ROWS,
    VOCAB,
    Cut,
    Mesh,
    boxes,
    part_shape,
    problem,
)

Array = NDArray[Any]
TP = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Case:
    cut: Cut
    source: Array
    tp: int
    dims: dict[str, int]

    def parts(self) -> list[Array]:
        """What each rank gets, laid out as `boxes` and `part_shape` say.  All else stays zero."""
        mesh = Mesh(self.tp)
        rows = self.source.reshape(self.source.shape[0], -1)
        out = []
        for rank in mesh.ranks:
            part = np.zeros(part_shape(self.cut, self.source.shape, mesh, self.dims), self.source.dtype)
            flat = part.reshape(part.shape[0], -1)
            row = 0
            for box in boxes(self.cut, self.source.shape, mesh, self.dims, rank):
                flat[row : row + box.rows] = rows[box.row : box.row + box.rows, box.col : box.col + box.cols]
                row += box.rows
            out.append(part)
        return out


@st.composite
def cases(draw: st.DrawFn, cut: Cut) -> Case:
    """A tensor of random bits that `cut` can divide over a random tp."""
    tp = draw(st.sampled_from(TP))
    small = st.integers(1, 5)
    dims = {"heads": tp * draw(st.integers(1, 3))}
    dims["kv_heads"] = draw(st.sampled_from([n for n in TP if n <= tp] + [2 * tp, 3 * tp]))
    head_dim, other = 2 * draw(small), draw(st.integers(1, 9))
    shapes = {
        "copy": (draw(small), other),
        "rows": (tp * draw(small), other),
        "cols": (other, tp * draw(small)),
        "heads": (dims["heads"] * head_dim, other),
        "kv_heads": (dims["kv_heads"] * head_dim, other),
        "head_cols": (other, dims["heads"] * head_dim),
        "vocab": (draw(st.integers(1, 70)), other),
    }
    shape: tuple[int, ...] = shapes[cut.name]
    if cut.axis != 1 and draw(st.booleans()):
        shape = shape[:1]  # a bias or a norm
    seed = draw(st.integers(0, 2**32 - 1))
    # never zero: what is left out shows
    source = np.random.default_rng(seed).integers(1, 2**16, shape, np.uint16)
    return Case(cut, source, tp, dims)


@given(cases(COPY))
@settings(deadline=None)
def test_a_copied_tensor_is_whole_on_every_rank(case: Case) -> None:
    for part in case.parts():
        assert np.array_equal(part, case.source)


@pytest.mark.parametrize("cut", [ROWS, HEADS], ids=lambda c: c.name)
def test_rows_joined_over_ranks_are_the_source(cut: Cut) -> None:
    @given(cases(cut))
    @settings(deadline=None)
    def check(case: Case) -> None:
        assert np.array_equal(np.concatenate(case.parts()), case.source)

    check()


@pytest.mark.parametrize("cut", [COLS, HEAD_COLS], ids=lambda c: c.name)
def test_columns_joined_over_ranks_are_the_source(cut: Cut) -> None:
    @given(cases(cut))
    @settings(deadline=None)
    def check(case: Case) -> None:
        assert np.array_equal(np.concatenate(case.parts(), axis=1), case.source)

    check()


@given(cases(KV_HEADS))
@settings(deadline=None)
def test_shared_kv_heads_are_equal_copies_and_join_to_the_source(case: Case) -> None:
    copies = max(1, case.tp // case.dims["kv_heads"])
    parts = case.parts()
    for rank, part in enumerate(parts):
        assert np.array_equal(part, parts[rank // copies * copies])
    assert np.array_equal(np.concatenate(parts[::copies]), case.source)


@given(cases(KV_HEADS))
@settings(deadline=None)
def test_a_rank_has_the_kv_head_that_its_query_heads_read(case: Case) -> None:
    """Query head q reads kv head q // (heads / kv_heads), whatever the rank."""
    kv_heads = case.dims["kv_heads"]
    heads = case.tp * kv_heads
    owner = np.repeat(np.arange(kv_heads, dtype=np.uint16), heads // kv_heads)
    queries = Case(HEADS, owner.reshape(-1, 1), case.tp, {**case.dims, "heads": heads})
    kvs = Case(KV_HEADS, np.arange(kv_heads, dtype=np.uint16).reshape(-1, 1), case.tp, case.dims)
    for wanted, had in zip(queries.parts(), kvs.parts(), strict=True):
        local = np.arange(len(wanted)) // (len(wanted) // len(had))
        assert np.array_equal(had[local], wanted)


@given(cases(VOCAB))
@settings(deadline=None)
def test_vocabulary_joins_to_the_source_and_its_padding_is_zero(case: Case) -> None:
    parts = case.parts()
    joined = np.concatenate(parts)
    assert np.array_equal(joined[: len(case.source)], case.source)
    assert not joined[len(case.source) :].any()
    assert len({part.shape for part in parts}) == 1
    assert len(joined) - len(case.source) < case.tp


@pytest.mark.parametrize("cut", [COPY, ROWS, COLS, HEADS, KV_HEADS, HEAD_COLS, VOCAB], ids=lambda c: c.name)
def test_what_can_be_cut_has_no_problem_and_one_shape(cut: Cut) -> None:
    @given(cases(cut))
    @settings(deadline=None)
    def check(case: Case) -> None:
        assert problem(cut, case.source.shape, Mesh(case.tp), case.dims) == ""

    check()


@pytest.mark.parametrize(
    ("cut", "shape", "tp", "number"),
    [
        (ROWS, (10, 3), 4, "10 rows"),
        (COLS, (3, 10), 4, "10 columns"),
        (HEADS, (6 * 8, 3), 4, "6 heads"),
        (HEADS, (6 * 8, 3), 12, "6 heads"),
        (KV_HEADS, (3 * 8, 3), 2, "3 kv heads"),
        (HEAD_COLS, (3, 6 * 8), 4, "6 heads"),
    ],
)
def test_what_does_not_divide_is_said_with_its_number(
    cut: Cut, shape: tuple[int, ...], tp: int, number: str
) -> None:
    text = problem(cut, shape, Mesh(tp), {"heads": 6, "kv_heads": 3})
    assert number in text
    assert f"tp={tp}" in text

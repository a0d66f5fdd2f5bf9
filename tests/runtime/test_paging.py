"""Batches that are cut: every token once, in order, with what stands before it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from msconv_runtime.paging import Batch, Sequences, Tails, chunks

PAGE = 4
LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=5)  # cached, new


def made(lengths: list[tuple[int, int]]) -> Batch:
    """A batch with cached tokens.  Tokens are numbered as they come."""
    sequences = Sequences(len(lengths), PAGE)
    sequences.advance([[0] * cached for cached, _ in lengths])
    ends = np.cumsum([new for _, new in lengths])
    return sequences.advance([list(range(end - new, end)) for end, (_, new) in zip(ends, lengths, strict=True)])


def fits(part: Batch, whole: Batch) -> bool:
    """Whether a part's tokens lie where the whole batch has them, and its sequences end with them."""
    tokens = part.input_ids
    same = all((getattr(part, n) == getattr(whole, n)[tokens]).all() for n in ("positions", "slots"))
    ends = np.cumsum(part.q_lens) - 1
    tables = part.block_tables[np.arange(len(ends)), part.positions[ends] // PAGE]
    slots = tables * PAGE + part.positions[ends] % PAGE
    return same and (part.context_lens == part.positions[ends] + 1).all() and (slots == part.slots[ends]).all()


@settings(deadline=None)
@given(LENGTHS, st.data())
def test_tails_come_piece_by_piece_after_what_stands_before_them(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    batch = made(lengths)
    tails = Tails(batch, [data.draw(st.integers(0, new - 1)) for _, new in lengths], PAGE)
    size, rows = data.draw(st.integers(1, 9)), sum(tails.counts)
    pieces = [tails.rows(begin, min(begin + size, rows)) for begin in range(0, rows, size)]
    first = tails.before()
    assert (first is None) == (not any(tails.firsts))
    parts = ([first] if first is not None else []) + pieces
    assert all(fits(part, batch) for part in parts)
    ends = np.cumsum(batch.q_lens)
    begins = ends - batch.q_lens
    wanted = [t for b, f, e in zip(begins, tails.firsts, ends, strict=True) for t in range(b + f, e)]
    assert np.concatenate([p.input_ids for p in pieces]).tolist() == wanted
    assert sorted(t for part in parts for t in part.input_ids.tolist()) == list(range(len(batch.input_ids)))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_chunks_have_every_token_in_order_and_no_more_than_asked_for(
    lengths: list[tuple[int, int]], most: int, ragged: bool
) -> None:
    batch = made(lengths)
    parts = [part for _, _, part in chunks(batch, PAGE, ragged, most)]
    assert all(fits(part, batch) for part in parts)
    assert np.concatenate([p.input_ids for p in parts]).tolist() == list(range(len(batch.input_ids)))
    for part in parts:
        places = len(part.input_ids) if ragged else len(part.q_lens) * int(part.q_lens.max())
        assert places <= most

"""Decoding of one request with fixed shapes: the same bits as by the graph of all shapes, where it fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from msconv_runtime import Session, single


@pytest.fixture
def session(compiled: Path) -> Session:
    found = Session(compiled)
    if not found.graphs.is_compiled:
        pytest.skip("no C++ compiler: no compiled kernels")
    return found


def counted(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the tables that the cell for one request got."""
    session.graphs.keep_caches(session._caches)
    bound, widths = session.graphs._single, []
    assert bound is not None
    inputs = bound.inputs
    monkeypatch.setattr(bound, "inputs", lambda b: (widths.append(b.block_tables.shape[1]), inputs(b))[1])
    return widths


def test_one_request_gives_the_same_bits_with_fixed_shapes(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, tokens = [[3, 1, 4, 1, 5]], [9, 2, 6, 5]
    session.prefill(prompt)
    widths = counted(session, monkeypatch)
    fixed = [session.decode([t]) for t in tokens]
    assert len(widths) == len(tokens)
    session.prefill(prompt)
    monkeypatch.setattr(single, "WIDTH", 0)  # no table is as short
    free = [session.decode([t]) for t in tokens]
    assert len(widths) == len(tokens)
    for one, other in zip(fixed, free, strict=True):
        assert np.array_equal(one, other)
    assert session.graphs.compiles == len(session.graphs.entries)


def test_what_does_not_fit_goes_to_the_graph_of_all_shapes(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prefill([[3, 1], [4]])
    widths = counted(session, monkeypatch)
    session.decode([1, 5])  # two sequences
    session.extend([[1, 2], [3]])
    assert widths == []
    session.prefill([[7]])
    session.decode([1])
    assert widths == [2]
    session.prefill([[5] * 1100])  # the caches grow: other ones
    bound = session.graphs._single
    session.decode([1])
    assert session.graphs._single is not bound
    assert widths == [2]

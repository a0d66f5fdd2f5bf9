"""Ahead of time means that no batch compiles anything: counted, and tried before a server is ready."""

from __future__ import annotations

from pathlib import Path

import pytest

from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.graphs import Graphs


@pytest.mark.parametrize("is_compiled", [True, False])
def test_no_shape_compiles_after_the_warm_up(compiled: Path, is_compiled: bool) -> None:
    from msconv_runtime import Session

    session = Session(compiled, compiled=is_compiled)
    for lengths in ([1], [3, 70, 1], [600, 2], [5] * 9):
        session.prefill([[1] * n for n in lengths])
        session.decode([2] * len(lengths))
    assert session.graphs.compiles == len(session.graphs.entries)
    assert session.graphs.compiles_since_ready == 0


def test_a_strict_start_is_refused_if_other_shapes_compile(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without declared inputs MindSpore compiles for each new width of the block table."""
    from mindspore import nn

    monkeypatch.setattr(nn.GraphCell, "set_inputs", lambda *_: None)
    graphs = Graphs(Artifact(compiled), "cpu")
    with pytest.raises(EnvironmentProblem, match="times more for a batch") as e:
        graphs.warm_up(strict=True)
    assert "--no-strict-aot" in e.value.hint
    loose = Graphs(Artifact(compiled), "cpu")
    loose.warm_up()
    assert loose.compiles_since_ready == 0

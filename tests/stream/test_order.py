"""In which order units are moved: as they lie in files, but for large ones where workers compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msconv.layout.plan import Plan
from msconv.location import LocalDirectory
from msconv.published import published
from msconv.steps.conversion import run
from msconv.steps.estimate import estimate
from msconv.stream import execute
from msconv.stream.execute import LARGE_BYTES, moving_order
from msconv.stream.hub_source import HubSource
from msconv.stream.source import DirectorySource
from tests.checkpoints import read_tree
from tests.conftest import Checkpoints
from tests.conversions import convert, prepare
from tests.stream.clusters import Threads, nodes_of
from tests.stream.crashes import crash

FEW: dict[str, Any] = {"first_k_dense_replace": 1, "n_routed_experts": 32, "n_group": 1, "topk_group": 1}
HERE: Any = SimpleNamespace(is_arriving=False)
ARRIVING: Any = SimpleNamespace(is_arriving=True)


def planned(model: str, quant: str | None, tmp_path: Path) -> Plan:
    """Of true widths and vocabulary, with two layers and few experts, from config.json alone."""
    root = published(model)
    assert root is not None
    raw = json.loads((root / "config.json").read_text())
    few = {"num_hidden_layers": 2, **(FEW if "n_routed_experts" in raw else {})}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **few}))
    place = LocalDirectory(tmp_path)
    return estimate(
        place, 2, 1, None, tmp_path / "out", 2, None, 64, 1, None, quant=quant, drafts=False, predict=False
    ).plan


def in_files(plan: Plan) -> list[tuple[str, ...]]:
    return sorted(plan.units, key=lambda u: (plan.sources[u[0]].file, plan.sources[u[0]].offset))


@pytest.mark.parametrize(
    ("model", "quant"),
    [("deepseek-ai/DeepSeek-V3", None), ("deepseek-ai/DeepSeek-V3", "w8a8"), ("Qwen/Qwen3-8B", "w8a8")],
)
def test_large_units_come_early_with_as_many_bytes_between(model: str, quant: str | None, tmp_path: Path) -> None:
    plan = planned(model, quant, tmp_path)
    order = moving_order(plan, HERE)
    assert sorted(order) == sorted(plan.units)
    sizes = [plan.unit_bytes(unit) for unit in order]
    large = [at for at, size in enumerate(sizes) if size >= LARGE_BYTES]
    assert len(large) == 2 and large[0] == 0 and sizes[large[0]] >= sizes[large[1]]
    assert sum(sizes[1 : large[1]]) >= min(sizes[0], sum(sizes) - sizes[0] - sizes[large[1]])
    others = [unit for unit in order if plan.unit_bytes(unit) < LARGE_BYTES]
    assert others == [unit for unit in in_files(plan) if unit in set(others)]


def test_what_arrives_or_is_only_copied_is_moved_as_it_lies_in_files(tmp_path: Path) -> None:
    arriving = planned("deepseek-ai/DeepSeek-V3", None, tmp_path)
    assert moving_order(arriving, ARRIVING) == in_files(arriving)
    assert moving_order(arriving, HERE) != in_files(arriving)
    assert HubSource.is_arriving and not DirectorySource.is_arriving
    copied = planned("Qwen/Qwen3-8B", None, tmp_path)
    assert moving_order(copied, HERE) == in_files(copied)


def test_an_order_that_another_version_had_resumes_to_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    convert(model, tmp_path / "whole", 2, quant="w8a8")
    crash(12, lambda: convert(model, out, 2, quant="w8a8"))
    monkeypatch.setattr(execute, "LARGE_BYTES", 1)
    conversion = prepare(model, 2, output=out, quant="w8a8")
    assert moving_order(conversion.plan, HERE) != in_files(conversion.plan)
    assert run(conversion, False).resumed
    assert read_tree(out) == read_tree(tmp_path / "whole")


def test_nodes_write_the_same_in_that_order(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    convert(model, tmp_path / "whole", 2, quant="w8a8")
    monkeypatch.setattr(execute, "LARGE_BYTES", 1)
    run(prepare(model, 2, output=out, quant="w8a8"), mover=nodes_of(Threads(["a", "b"]), []))
    assert read_tree(out) == read_tree(tmp_path / "whole")

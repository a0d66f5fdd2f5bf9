"""What the runtime does for an NPU and can be tried without one and without a server; the rest is rehearsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from msconv_runtime import binding
from msconv_runtime.artifact import Artifact, Graph, GraphInput
from msconv_runtime.errors import ArtifactError
from msconv_runtime.graphs import Graphs, Place
from msconv_runtime.kernels import Library
from msconv_runtime.paging import Batch
from msconv_runtime.serving.launch import plan_launch
from msconv_runtime.sglang.flags import pool_problems
from msconv_runtime.sglang.groups import find_groups
from msconv_runtime.targets.ascend import ASCEND910B
from tests.conftest import Checkpoints
from tests.warm import run_warm


@pytest.fixture(scope="module")
def ascend(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, for a 910B."""
    root = tmp_path_factory.mktemp("ascend") / "tp2"
    for line in (
        ("convert", "--model", checkpoint("untied"), "--tp", 2, "--output", root),
        ("compile", root, "--target", "ascend910b"),
    ):
        done = run_warm(*line)
        assert done.code == 0, done.stderr
    return root


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("strict", [True, False])
def test_the_warm_up_stays_within_its_caches(
    ascend: Path, monkeypatch: pytest.MonkeyPatch, page: int, strict: bool
) -> None:
    """Pages are the server's: Ascend's graphs leave them free.  Each graph runs once; other shapes are only
    asked for."""
    calls: list[tuple[str, int, int, tuple[int, ...]]] = []
    asked: list[str] = []

    def call(self: Any, graph: Graph, batch: Batch, caches: Any, hidden: Any) -> dict[str, Any]:
        shape = tuple(caches[0].shape)
        calls.append((graph.role, int(batch.slots.max()), int(batch.block_tables.max()), shape))
        return {"logits": np.zeros(0)}

    def ask(self: Any, graph: Graph, batch: Batch, caches: Any, hidden: Any) -> None:
        asked.append(graph.role)
        assert batch.block_tables.shape[1] > 1

    monkeypatch.setattr("msconv_runtime.graphs.bind", lambda *args: type("Cell", (), {"compile_cache": {}})())
    monkeypatch.setattr(Graphs, "_call", call)
    monkeypatch.setattr(Graphs, "_compile", ask)
    graphs = Graphs(Artifact(ascend), "ascend910b", Place(page=page))
    graphs.warm_up(strict)
    assert graphs.page == page
    assert [role for role, *_ in calls] == ["prefill", "decode", "verify"]
    assert asked == (["prefill", "decode", "verify"] if strict else [])
    for role, slot, table, (pages, slots, heads, width) in calls:
        assert (slots, heads, width) == (page, 1, 32), role
        assert slot < pages * slots, f"{role}: slot {slot} of {pages * slots}"
        assert table < pages, f"{role}: page {table} of {pages}"


def test_collectives_get_the_name_that_the_server_gave_its_group(
    ascend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MindSpore loads the same graph but for that name."""
    import mindspore
    from mindspore.train import mind_ir_pb2

    loaded: list[bytes] = []
    monkeypatch.setattr(mindspore, "load", lambda path: loaded.append(Path(path).read_bytes()))
    path = ascend / "graphs/ascend910b/decode.mindir"
    binding._load(path.read_bytes(), Library(None), {"msconv_tp": "tp:0"})
    before, after = (mind_ir_pb2.ModelProto.FromString(data) for data in (path.read_bytes(), loaded[0]))

    def groups(model: Any) -> list[str]:
        return [a.s.decode() for p in model.primitives for a in p.attribute if a.name == "group"]

    assert set(groups(before)) == {"msconv_tp"}
    assert set(groups(after)) == {"tp:0"}
    for attribute in (a for p in after.primitives for a in p.attribute if a.name == "group"):
        attribute.s = b"msconv_tp"
    assert before == after
    binding._load(path.read_bytes(), Library(None), {})
    assert loaded[1] == path.read_bytes()


def test_on_an_npu_no_second_group_is_made(ascend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspore import communication

    def create(*args: Any) -> None:
        raise AssertionError(f"a group is made: {args}")

    monkeypatch.setattr(communication, "create_group", create)
    group = type("Group", (), {"world_size": 2, "unique_name": "tp:3", "ranks": [0, 1]})()
    assert find_groups(Artifact(ascend), ASCEND910B, group) == {"msconv_tp": "tp:3"}
    group.world_size = 1
    assert find_groups(Artifact(ascend), ASCEND910B, group) == {}


def test_a_server_that_loses_a_process_does_not_wait_for_cuda(ascend: Path) -> None:
    found = plan_launch(ascend, "npu", "127.0.0.1", 30000, [], elsewhere=True)
    assert found.environment["SGLANG_CUDA_COREDUMP_BEFORE_CRASH"] == "0"


@pytest.mark.parametrize(
    ("names", "lacking"),
    [
        ({"prefill", "mixed_compiled"}, "no decode"),
        ({"mixed_compiled"}, "no prefill and no decode"),
        ({"verify"}, "no prefill and no decode"),
        ({"decode"}, "no prefill"),
        (set(), ""),
    ],
)
def test_a_set_of_graphs_that_could_not_serve_is_refused(compiled: Path, names: set[str], lacking: str) -> None:
    manifest = Artifact(compiled).manifest
    some = [g for g in manifest.graphs if g.name in names]
    with pytest.raises(ArtifactError, match=f"has no graphs for cpu.*{lacking}"):
        Artifact(compiled, msgspec.structs.replace(manifest, graphs=some)).graphs("cpu")
    assert len(Artifact(compiled).graphs("cpu")) == 5


@pytest.mark.parametrize(
    ("width", "page", "kv_dtype", "told"),
    [
        (128, 128, "auto", ""),
        (576, 16, "auto", ""),
        (576, 32, "auto", "--page-size 32"),
        (128, 24, "auto", "--page-size 24"),
        (128, 1, "auto", "--page-size 1"),
        (64, 256, "bf16", ""),
        (64, 256, "bfloat16", ""),
        (128, 128, "fp8_e4m3", "--kv-cache-dtype fp8_e4m3"),
        (128, 128, "float16", "--kv-cache-dtype float16"),
    ],
)
def test_pools_that_the_graphs_cannot_take(width: int, page: int, kv_dtype: str, told: str) -> None:
    cache = GraphInput("k_cache.0", "bfloat16", [None, None, 1, width])
    assert bool(pool_problems(ASCEND910B, cache, page, kv_dtype)) == bool(told)
    assert told in "".join(pool_problems(ASCEND910B, cache, page, kv_dtype))

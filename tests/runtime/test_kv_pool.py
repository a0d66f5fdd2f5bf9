"""KV pools: bytes of a token, pages that graphs can share, how large a pool is by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv.checkpoint.reference import configuration
from msconv.layout.cuts import Mesh
from msconv.layout.memory import kv_bytes_per_token
from msconv_runtime.artifact import Artifact, GraphInput
from msconv_runtime.kv_pool import POOL_BYTES, POOL_TOKENS, page_problem, token_bytes, usual_pool, weight_bytes
from msconv_runtime.targets import CPU, TARGETS, Target, usual_target
from tests.commands import Result
from tests.conftest import Checkpoints
from tests.moe_checkpoints import make_deepseek_v3
from tests.warm import run_warm


def with_caches(root: Path, change: Callable[[GraphInput], GraphInput]) -> Artifact:
    """The artifact as if its graphs took other caches."""
    manifest = Artifact(root).manifest
    graphs = [
        msgspec.structs.replace(g, inputs=[change(i) if i.kind == "cache" else i for i in g.inputs])
        for g in manifest.graphs
    ]
    return Artifact(root, msgspec.structs.replace(manifest, graphs=graphs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latent", "tp", "target"),
    [(False, 1, "cpu"), (False, 4, "ascend910b"), (True, 2, "cpu"), (True, 2, "ascend310p")],
)
def test_graphs_take_what_a_plan_says_before_there_are_graphs(
    checkpoint: Checkpoints, msconv: Callable[..., Result], tmp_path: Path, latent: bool, tp: int, target: str
) -> None:
    """Two ways to the bytes of a token: from a model's sizes, and from the inputs of its graphs."""
    model = make_deepseek_v3(tmp_path / "model", dtype="float16") if latent else checkpoint("untied")
    root = tmp_path / "graphs"
    done = run_warm("compile", "--model", model, "--tp", tp, "--target", target, "--output", root)
    assert done.code == 0, done.stderr
    artifact = Artifact(root)
    caches = artifact.graphs(target)[0].caches
    assert token_bytes(caches) == kv_bytes_per_token(
        configuration(artifact).sizes(), Mesh(tp), TARGETS[target].dtype
    )


def test_weights_count_once_though_several_graphs_read_them(compiled: Path) -> None:
    artifact = Artifact(compiled)
    graphs = artifact.graphs("cpu")
    assert weight_bytes(graphs[:1]) <= weight_bytes(graphs) < sum(weight_bytes([g]) for g in graphs)


@pytest.mark.parametrize(("width", "tokens"), [(1, POOL_TOKENS[1]), (1 << 20, POOL_TOKENS[0]), (1000, None)])
def test_a_pool_in_a_machines_memory_is_bounded_and_has_whole_pages(
    compiled: Path, width: int, tokens: int | None
) -> None:
    def wide(cache: GraphInput) -> GraphInput:
        return msgspec.structs.replace(cache, shape=[*cache.shape[:-1], width])

    artifact = with_caches(compiled, wide)
    pool = usual_pool(artifact, CPU)
    assert pool.dtype == "float32"
    assert pool.tokens % pool.page == 0
    if tokens is None:
        size = pool.tokens * token_bytes(artifact.graphs("cpu")[0].caches)
        assert POOL_BYTES * 0.99 < size <= POOL_BYTES
    else:
        assert pool.tokens == tokens


@pytest.mark.parametrize(("width", "page"), [(64, 128), (256, 64), (576, 16), (1024, 16), (4096, 16)])
def test_a_device_gets_the_best_page_that_its_attention_takes(compiled: Path, width: int, page: int) -> None:
    device = usual_target("npu")

    def wide(cache: GraphInput) -> GraphInput:
        return msgspec.structs.replace(cache, shape=[None, None, 1, width], dtype=device.dtype)

    artifact = with_caches(compiled, wide)
    graphs = [msgspec.structs.replace(g, target=device.name) for g in artifact.manifest.graphs]
    artifact = Artifact(compiled, msgspec.structs.replace(artifact.manifest, graphs=graphs))
    pool = usual_pool(artifact, device)
    assert (pool.page, pool.tokens, pool.dtype) == (page, 0, device.dtype)
    cache = artifact.graphs(device.name)[0].caches[0]
    assert bool(page_problem(device, cache, page)) == (width > 1024)


@pytest.mark.parametrize(("page", "fits"), [(1, True), (16, True), (4096, True), (0, False)])
def test_a_cpu_takes_pages_of_any_size(compiled: Path, page: int, fits: bool) -> None:
    cache: Any = Artifact(compiled).graphs("cpu")[0].caches[0]
    target: Target = CPU
    assert (page_problem(target, cache, page) == "") == fits

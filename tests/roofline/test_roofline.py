"""`msconv plan --roofline`: graphs of few layers stand for all, and what is said is a bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msconv.layout.cuts import Mesh
from msconv.location import LocalDirectory
from msconv.mindir.shapes import Batch
from msconv.mindir.work import total
from msconv.steps.compile import begin_without_weights, compile_graphs
from msconv.steps.estimate import Estimate, estimate
from msconv.steps.roofline import (
    Asked,
    Graphs,
    counted,
    graphs_of_artifact,
    made_graphs,
    repeated,
    roofline,
    roofline_of_artifact,
)
from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import UsageError
from msconv_runtime.roles import DECODE, PREFILL, VERIFY, Role
from msconv_runtime.targets import figures_named
from tests.cli.interface import fields
from tests.cli.test_interface import frozen_fields
from tests.commands import run_msconv
from tests.exports import config_named
from tests.moe_checkpoints import SMALL_DEEPSEEK_V3

DEVICE, MESH = "910B3", Mesh(4, 2)
DEEP: dict[str, Any] = {
    **SMALL_DEEPSEEK_V3,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 6,
    "first_k_dense_replace": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json alone: three layers without experts, three with."""
    root = tmp_path_factory.mktemp("deep")
    (root / "config.json").write_text(json.dumps(DEEP))
    return root


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its whole graphs, compiled."""
    root = tmp_path_factory.mktemp("artifacts") / "deep"
    begin_without_weights(LocalDirectory(model), 4, 2, root)
    compile_graphs(root, "ascend910b")
    return root


def planned(model: Path, tmp_path: Path, tp: int = 4, ep: int = 2) -> Estimate:
    return estimate(LocalDirectory(model), tp, ep, None, tmp_path / "out", 1, None, 64, 2, None)


def all_work(graphs: Graphs, role: Role, batch: Batch) -> dict[str, Any]:
    whole = total(counted(graphs, role, batch))
    return {
        "launches": whole.launches,
        "weights": pytest.approx(whole.weight_bytes),
        "cache": whole.kv_bytes,
        "activations": pytest.approx(whole.activation_bytes),
        "operations": pytest.approx(whole.half_operations),
        "collectives": dict(whole.collectives),
        "kinds": dict(whole.kinds),
    }


@pytest.mark.slow
def test_a_few_layers_stand_for_all(model: Path, artifact: Path, tmp_path: Path) -> None:
    """Made without weights for the first layers only, the graphs count as the artifact's whole ones."""
    target, _ = figures_named(DEVICE)
    plan = planned(model, tmp_path)
    made = made_graphs(plan.checkpoint.config, plan.plan, target, (PREFILL, DECODE, VERIFY))
    whole = graphs_of_artifact(Artifact(artifact), target, plan.plan.mesh, (PREFILL, DECODE, VERIFY))
    assert (len(made.times), len(whole.times)) == (4, 6)
    for role, batch in ((DECODE, Batch(3, 1, 50)), (PREFILL, Batch(1, 40, 40)), (VERIFY, Batch(2, 3, 50))):
        assert all_work(made, role, batch) == all_work(whole, role, batch)


@pytest.mark.slow
def test_an_artifact_is_bound_by_its_own_graphs_and_in_its_own_layout(
    model: Path, artifact: Path, tmp_path: Path
) -> None:
    asked = Asked(DEVICE, 64, 2)
    found = roofline_of_artifact(artifact, MESH, asked)
    assert (found.made, found.layers_read) == (False, 6)
    made = roofline(planned(model, tmp_path), asked)
    assert found.decode.bound.seconds == pytest.approx(made.decode.bound.seconds)
    with pytest.raises(UsageError, match="is an artifact of tp 4, ep 2"):
        roofline_of_artifact(artifact, Mesh(2), asked)
    with pytest.raises(UsageError, match="no prefill and no decode graph for ascend910c"):
        roofline_of_artifact(artifact, MESH, Asked("910C", 64, 2))


@pytest.mark.slow
def test_drafts_divide_a_longer_step_by_what_is_accepted(artifact: Path) -> None:
    plain = roofline_of_artifact(artifact, MESH, Asked(DEVICE, 64, 2)).decode
    drafted = roofline_of_artifact(artifact, MESH, Asked(DEVICE, 64, 2, 4, 2.5)).decode
    assert (plain.role, drafted.role, drafted.batch.tokens) == ("decode", "verify", 8)
    assert drafted.bound.seconds is not None
    assert plain.bound.seconds is not None
    assert drafted.bound.seconds > plain.bound.seconds
    assert drafted.seconds_per_token == pytest.approx(drafted.bound.seconds / 2.5)
    assert drafted.tokens_per_second == pytest.approx(2.5 * 2 / drafted.bound.seconds)


def test_layers_of_each_kind_are_made_once_and_the_first_stands_for_itself() -> None:
    config = config_named("deepseek_v3")
    assert repeated(config, {}) == {0: 1, 1: 1}
    assert repeated(config_named("qwen3"), {}) == {0: 1}
    deep = config_named("qwen3_moe")
    alike = {f"model.layers.{i}.self_attn.o_proj.weight": "bfloat16" for i in range(2)}
    assert repeated(deep, alike) == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(4, 0.0), (0, 2.0), (4, 5.0), (100, 2.0)],
    ids=["no length", "no tokens", "longer", "many"],
)
def test_drafts_that_cannot_be_are_refused(tokens: int, length: float) -> None:
    with pytest.raises(UsageError, match=r"--draft-tokens|--accept-length"):
        Asked(DEVICE, 64, 1, tokens, length)


def test_an_unknown_device_is_one_message_with_those_there_are(model: Path, tmp_path: Path) -> None:
    done = run_msconv("plan", model, "--tp", 2, "--roofline", "910X", cwd=tmp_path)
    assert done.code == 2
    assert "910X: no device whose figures are known here." in done.stderr
    assert "910B2" in done.stderr and "310P" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_answer_says_that_it_is_a_bound(model: Path, artifact: Path, tmp_path: Path) -> None:
    options = ("--tp", 4, "--ep", 2, "--context", 64, "--roofline", DEVICE)
    done = run_msconv("plan", model, *options, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    of_experts = {f for f in fields(done.json) if not f.startswith(("ranks[].expert", "ranks[].draft"))}
    assert sorted(of_experts) == sorted(frozen_fields()["msconv plan --roofline"])
    found = done.json["roofline"]
    assert (found["is_bound"], found["is_measured"], found["device"]) == (True, False, DEVICE)
    decode = found["decode"]
    read = decode["weight_bytes"] + decode["kv_bytes"]
    assert decode["memory_s"] == pytest.approx(read / found["memory_bytes_per_s"], rel=1e-4)
    said = run_msconv("plan", artifact, *options, cwd=tmp_path)
    assert said.code == 0, said.stderr
    assert "bounds from published figures, not measurements" in said.stdout
    assert "source: " in said.stdout

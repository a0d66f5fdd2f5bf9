"""Planted faults in models with experts: each takes the proof away, and the place of each is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from msconv.cli.verify import command
from msconv.steps.compile import compile_graphs
from msconv.verify.compare import compare
from msconv.verify.prove import prove
from msconv_runtime.artifact import read_manifest, write_manifest
from msconv_runtime.errors import VerificationFailed
from tests.checkpoints import read_safetensors, write_safetensors
from tests.conversions import convert
from tests.moe_checkpoints import make_deepseek_v3, make_qwen3_moe, quantise_fp8
from tests.verify import moe_faults
from tests.verify.faults import attention, mlp
from tests.verify.planting import Fault, edit_graphs, edit_weights
from tests.verify.test_mutations import Remembered

pytestmark = pytest.mark.slow

TARGETS = {"deepseek": ("ascend910b", "cpu"), "qwen": ("ascend310p", "cpu")}
FAULTS: dict[str, tuple[str, Fault]] = {
    f"{family}: {fault.name}": (family, fault)
    for family, faults in (("deepseek", moe_faults.DEEPSEEK), ("qwen", moe_faults.QWEN))
    for fault in faults
}
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 2 * moe_faults.HALF,
    "max_position_embeddings": 128,
}
BLOCK = (32, 32)


@dataclass(frozen=True)
class Sound:
    """An artifact without a fault for four ranks in two groups, its source, and the reference."""

    model: Path
    root: Path
    reference: Remembered


def sound(model: Path, root: Path, targets: tuple[str, ...], **options: Any) -> Sound:
    from msconv.verify.reference import Reference

    convert(model, root, 4, ep=2, **options)
    for target in targets:
        compile_graphs(root, target)
    return Sound(model, root, Remembered(Reference(model, read_manifest(root))))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    """Both families: DeepSeek in FP8, its first layer dense; Qwen3 with experts in layer 1 alone."""
    directory = tmp_path_factory.mktemp("moe-faults")
    deepseek = quantise_fp8(
        make_deepseek_v3(directory / "wide", v_head_dim=16, **SIZES), directory / "deepseek", BLOCK
    )
    qwen = make_qwen3_moe(directory / "qwen", mlp_only_layers=[0, 2], **SIZES)
    return {
        "deepseek": sound(deepseek, directory / "deepseek-tp4", TARGETS["deepseek"], dtype="float32"),
        "qwen": sound(qwen, directory / "qwen-tp4", TARGETS["qwen"]),
    }


@pytest.fixture
def own(models: dict[str, Sound], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy that the test may change; proofs take the remembered reference and fewer steps of decode."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setattr("msconv.verify.subject.compare", lambda *a, **k: compare(*a, **{**k, "steps": 2}))

    def copy(family: str) -> Path:
        reference = models[family].reference
        monkeypatch.setattr(
            "msconv.verify.subject.Reference", lambda *a: reference if not a[2] else type(reference.reference)(*a)
        )
        return Path(shutil.copytree(models[family].root, tmp_path / "own"))

    return copy


def named(root: Path, target: str, layers: int = 0) -> str:
    """What a proof that must fail names."""
    try:
        proof = prove(root, target, None, layers)
    except VerificationFailed as e:
        return e.message
    assert not proof.ok, f"proven, with errors of {proof.comparison.max_abs_logit_error:.1e}"
    assert read_manifest(root).proof_for(target) is None
    return proof.comparison.first


CASES = [(family, target) for family, targets in TARGETS.items() for target in targets]


def test_faults_cover_both_families_and_their_targets() -> None:
    assert len(FAULTS) == len(moe_faults.DEEPSEEK) + len(moe_faults.QWEN) >= 60
    assert {(family, fault.target) for family, fault in FAULTS.values()} == set(CASES)


@pytest.mark.parametrize(("family", "target"), CASES)
def test_without_a_fault_the_same_edits_leave_a_proof(
    own: Callable[[str], Path], family: str, target: str
) -> None:
    root = own(family)
    edit_weights(root, lambda ranks: None)
    edit_graphs(root, target, ("prefill", "decode", "verify"), lambda edit: None)
    proof = prove(root, target, None)
    assert proof.ok, proof.comparison
    assert proof.comparison.undecided == 0
    assert read_manifest(root).proof_for(target) is not None


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize(
    "change",
    [
        moe_faults.renumbered(1, 1, 2),
        moe_faults.order_of_ranks(
            (1, 0, 3, 2), *(f"model.layers.1.{p}" for p in (moe_faults.GATE_UP, moe_faults.DOWN))
        ),
    ],
    ids=["experts are renumbered", "halves change places together"],
)
def test_what_is_the_same_model_is_still_proven(own: Callable[[str], Path], family: str, change: Any) -> None:
    root = own(family)
    edit_weights(root, change)
    assert prove(root, "cpu", None).ok


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_its_place_named(own: Callable[[str], Path], name: str) -> None:
    family, fault = FAULTS[name]
    root = own(family)
    fault.plant(root)
    place = named(root, fault.target)
    assert re.search(fault.place, place), f"named: {place!r}"


SCALES = {
    "model.layers.1.mlp.experts.3.up_proj.weight": mlp(1),
    "model.layers.1.mlp.experts.15.down_proj.weight": mlp(1),
    "model.layers.2.mlp.shared_experts.gate_proj.weight": "the last layer's mlp",
    "model.layers.0.mlp.down_proj.weight": mlp(0),
    "model.layers.1.self_attn.kv_b_proj.weight": attention(1),
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": attention(2),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_forgotten_scale_of_one_block_is_caught(
    models: dict[str, Sound], own: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Converted with 1 in place of the scale of a matrix's last block; compared with the checkpoint itself."""
    root = own("deepseek")
    graphs = read_manifest(root).graphs
    faulty = Path(shutil.copytree(models["deepseek"].model, tmp_path / "faulty"))
    (path,) = faulty.glob("*.safetensors")
    tensors = read_safetensors(path)
    bits = tensors[name + "_scale_inv"].bits.copy()
    bits[-1, -1] = 0x3F800000
    tensors[name + "_scale_inv"] = type(tensors[name])("F32", bits)
    write_safetensors(path, tensors)
    shutil.rmtree(root / "weights")
    convert(faulty, tmp_path / "converted", 4, ep=2, dtype="float32")
    shutil.move(tmp_path / "converted" / "weights", root / "weights")
    write_manifest(root, msgspec.structs.replace(read_manifest(tmp_path / "converted"), graphs=graphs))
    assert re.search(SCALES[name], named(root, "ascend910b"))


# Verify, as it is asked for.
@pytest.mark.parametrize(("family", "target"), [("deepseek", "ascend910b"), ("qwen", "cpu")])
def test_json_says_how_close_routing_was(own: Callable[[str], Path], family: str, target: str) -> None:
    root = own(family)
    done = CliRunner().invoke(command, [str(root), "--target", target, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert said["undecided"] == 0
    assert 2e-5 <= said["closest_routing"] < 1
    assert said["ranks"] == 4
    assert said["rows"] == (111 if target != "cpu" else 2 * 111)  # of both kinds of graphs
    assert said["layers"] is None
    assert "half_precision_bound" not in said  # half precision takes other experts
    assert ("half_precision_max_abs_logit_error" in said) == (target != "cpu")


@pytest.mark.parametrize(("family", "target"), CASES)
def test_the_first_layers_can_be_compared_alone(own: Callable[[str], Path], family: str, target: str) -> None:
    root = own(family)
    done = CliRunner().invoke(command, [str(root), "--target", target, "--layers", "2", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert said["layers"] == 2
    assert said["undecided"] == 0
    assert 2e-5 <= said["closest_routing"] < 10
    assert set(said["norms"]) == {
        *(f"model.layers.{i}.input_layernorm" for i in range(3)),
        *(f"model.layers.{i}.post_attention_layernorm" for i in range(2)),
    }
    assert read_manifest(root).proof_for(target) is None


@pytest.mark.parametrize("family", TARGETS)
def test_of_the_first_layers_only_their_faults_are_seen(own: Callable[[str], Path], family: str) -> None:
    root = own(family)
    edit_weights(root, moe_faults.rows_rolled("model.layers.2.self_attn.o_proj.weight"))
    assert prove(root, "cpu", None, layers=2).ok
    assert re.search(attention(2), named(root, "cpu"))
    edit_weights(root, moe_faults.experts_exchanged(1, 1, 6))
    assert re.search(mlp(1), named(root, "cpu", layers=2))

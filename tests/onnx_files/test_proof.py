"""ONNX graphs of every family compute what transformers computes, in both forms; a fault is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from msconv.steps.compile import compile_graphs
from msconv_runtime.artifact import Artifact, digest_bytes, read_manifest
from tests.conversions import convert
from tests.moe_checkpoints import add_mtp, make_deepseek_v3, quantise_fp8
from tests.onnx_files.making import FAMILIES, FIXED, TWO_LAYERS, every_layout, proved, with_graphs

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "biases": ("qwen3", {"attention_bias": True}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "linear rope": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "no shared keys": ("qwen3", {"num_key_value_heads": 8}),
    "bfloat16": ("qwen3", {"dtype": "bfloat16"}),
    "float16": ("qwen3", {"dtype": "float16", "tie_word_embeddings": True}),
    "experts, bfloat16": ("qwen3_moe", {"dtype": "bfloat16"}),
    "experts, float16": ("qwen3_moe", {"dtype": "float16"}),
    "one expert a token": (
        "qwen3_moe",
        {"num_experts_per_tok": 1, "norm_topk_prob": False, "mlp_only_layers": []},
    ),
    "latents, bfloat16": ("deepseek_v3", {"dtype": "bfloat16", "max_position_embeddings": 1024}),
    "latents, float16": ("deepseek_v3", {"dtype": "float16", "max_position_embeddings": 1024}),
    "no groups": (
        "deepseek_v3",
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "two shared experts": ("deepseek_v3", {"n_shared_experts": 2, "first_k_dense_replace": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_of_every_family_are_proved(family: str, tmp_path: Path) -> None:
    source, root = with_graphs(tmp_path, family, **TWO_LAYERS[family])
    proof = proved(source, root)
    entry = read_manifest(root).proof_for("onnx")
    assert entry is not None
    assert entry.max_abs_logit_error == proof.comparison.max_abs_logit_error
    assert len(entry.graph_digests) == 3


@every_layout
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_proved(name: str, tmp_path: Path) -> None:
    family, overrides = MODELS[name]
    proved(*with_graphs(tmp_path, family, **overrides))


@every_layout
def test_a_published_fp8_checkpoint_is_proved(tmp_path: Path) -> None:
    plain = make_deepseek_v3(tmp_path / "plain", dtype="bfloat16", max_position_embeddings=1024)
    source = quantise_fp8(plain, tmp_path / "fp8")
    convert(source, tmp_path / "artifact")
    compile_graphs(tmp_path / "artifact", "onnx", fixed=FIXED)
    proved(source, tmp_path / "artifact")


@every_layout
def test_a_draft_is_left_to_other_targets(tmp_path: Path) -> None:
    """The weights of multi-token prediction stay where they are; no ONNX graph reads them."""
    plain = make_deepseek_v3(tmp_path / "source", max_position_embeddings=1024)
    convert(add_mtp(plain), tmp_path / "artifact")
    compile_graphs(tmp_path / "artifact", "onnx", fixed=FIXED)
    assert read_manifest(tmp_path / "artifact").draft is not None
    proved(plain, tmp_path / "artifact")


@pytest.mark.slow
def test_a_fault_in_either_form_is_found(tmp_path: Path) -> None:
    """A scale that is a little off, in a graph that is of the permitted kind and whose digest is right."""
    from msconv.verify.prove import prove

    source, root = with_graphs(tmp_path, "qwen3", num_hidden_layers=1, vocab_size=203)
    for name, phase in (("mixed", "prefill"), ("decode_static", "static decode")):
        artifact = Artifact(root)
        graph = next(g for g in artifact.manifest.graphs if g.name == name)
        path = root / graph.path
        sound, before = path.read_bytes(), artifact.manifest.graphs
        model = onnx.ModelProto.FromString(sound)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "scale":
                    attribute.f *= 1.01
        for constant in model.graph.initializer:
            if not constant.external_data and onnx.numpy_helper.to_array(constant).size == 16:
                rates = onnx.numpy_helper.to_array(constant) * 1.01  # of rotation
                constant.CopyFrom(onnx.numpy_helper.from_array(rates.astype("float32"), constant.name))
        bad = model.SerializeToString(deterministic=True)
        path.write_bytes(bad)
        from msgspec.structs import replace

        changed = [replace(g, size=len(bad), digest=digest_bytes(bad)) if g.name == name else g for g in before]
        artifact.changed(graphs=changed)
        proof = prove(root, "onnx", source)
        assert not proof.ok
        assert proof.comparison.by_phase[phase] > 1e-4, name
        assert read_manifest(root).proof_for("onnx") is None
        path.write_bytes(sound)
        Artifact(root).changed(graphs=before)

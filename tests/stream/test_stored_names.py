"""Checkpoints with other names than the published: the artifact is the same, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from msconv.checkpoint.directory import open_checkpoint
from msconv.checkpoint.unsupported import UnsupportedCheckpoint
from tests.checkpoints import Stored, read_safetensors, write_safetensors
from tests.conversions import convert, prepare
from tests.moe_checkpoints import make_deepseek_v3, make_qwen3_moe
from tests.synthetic import digests, qwen3_config, write_synthetic

SINGLE = "model.safetensors"


def weights(artifact: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(artifact).items() if name.startswith("weights")}


def renamed(source: Path, directory: Path, body: str, head: str) -> Path:
    """A copy with `body` instead of `model.`, and `head` before the head's name."""
    directory.mkdir()
    for path in source.glob("*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = read_safetensors(source / SINGLE)
    write_safetensors(
        directory / SINGLE,
        {body + n.removeprefix("model.") if n.startswith("model.") else head + n: t for n, t in tensors.items()},
    )
    return directory


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("_orig_mod.model.", "_orig_mod."),
        ("module.model.", "module."),
        ("module._orig_mod.model.", "module._orig_mod."),
        ("model.model.", "model."),
        ("", ""),
        ("language_model.model.", "language_model."),
        ("model.language_model.", ""),
    ],
)
def test_a_prefix_before_all_names_is_read_past_and_said(tmp_path: Path, body: str, head: str) -> None:
    plain = write_synthetic(tmp_path / "plain", qwen3_config(num_hidden_layers=2))
    other = renamed(plain, tmp_path / "other", body, head)
    convert(plain, tmp_path / "a", tp=2)
    convert(other, tmp_path / "b", tp=2)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    notes = prepare(other, 2, output=tmp_path / "c").notes
    assert any((body or "lack the prefix") in note for note in notes)
    assert not any("begin with" in note for note in prepare(plain, 2, output=tmp_path / "c").notes)


def test_a_prefix_before_some_names_only_is_refused(tmp_path: Path) -> None:
    plain = write_synthetic(tmp_path / "plain", qwen3_config(num_hidden_layers=2))
    other = renamed(plain, tmp_path / "other", "module.model.", "module.")
    tensors = read_safetensors(other / SINGLE)
    name = "module.model.layers.1.mlp.up_proj.weight"
    tensors[name.removeprefix("module.")] = tensors.pop(name)
    write_safetensors(other / SINGLE, tensors)
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj"):
        open_checkpoint(other)


def stack(source: Path, directory: Path, experts: int) -> Path:
    """A copy with each layer's experts in one tensor, as transformers 5 saves them if it is told to."""
    directory.mkdir()
    for path in source.glob("*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = read_safetensors(source / SINGLE)
    for prefix in sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n}):
        kinds = {
            kind: [tensors.pop(f"{prefix}.experts.{e}.{kind}.weight") for e in range(experts)]
            for kind in ("gate_proj", "up_proj", "down_proj")
        }
        code = kinds["gate_proj"][0].code
        both = [
            np.concatenate([g.bits, u.bits]) for g, u in zip(kinds["gate_proj"], kinds["up_proj"], strict=True)
        ]
        tensors[f"{prefix}.experts.gate_up_proj"] = Stored(code, np.stack(both))
        tensors[f"{prefix}.experts.down_proj"] = Stored(code, np.stack([d.bits for d in kinds["down_proj"]]))
    write_safetensors(directory / SINGLE, tensors)
    return directory


@pytest.mark.parametrize("body", ["model.", "_orig_mod.model."])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 2)])
def test_stacked_experts_give_the_same_artifact(tmp_path: Path, tp: int, ep: int, body: str) -> None:
    plain = make_qwen3_moe(tmp_path / "plain", dtype="bfloat16")
    stacked = stack(plain, tmp_path / "stacked", 16)
    if body != "model.":
        stacked = renamed(stacked, tmp_path / "prefixed", body, body.removesuffix("model."))
    convert(plain, tmp_path / "a", tp=tp, ep=ep)
    convert(stacked, tmp_path / "b", tp=tp, ep=ep)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert any("stacked" in note for note in open_checkpoint(stacked).notes)


def test_stacked_experts_are_what_transformers_saves(tmp_path: Path) -> None:
    """Saved by transformers itself, not by the helper of this file."""
    from transformers import AutoModelForCausalLM

    plain = make_qwen3_moe(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "saved", save_original_format=False)
    theirs, ours = (
        read_safetensors(tmp_path / "saved" / SINGLE),
        read_safetensors(stack(plain, tmp_path / "s", 16) / SINGLE),
    )
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[n].bits, ours[n].bits) for n in theirs)


def test_stacked_experts_of_deepseek_too(tmp_path: Path) -> None:
    plain = make_deepseek_v3(tmp_path / "plain")
    convert(plain, tmp_path / "a", tp=2, ep=2)
    convert(stack(plain, tmp_path / "stacked", 16), tmp_path / "b", tp=2, ep=2)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_stacked_experts_that_are_transposed_are_refused(tmp_path: Path) -> None:
    stacked = stack(make_qwen3_moe(tmp_path / "plain"), tmp_path / "stacked", 16)
    tensors = read_safetensors(stacked / SINGLE)
    turned = {
        n: Stored(t.code, np.ascontiguousarray(t.bits.transpose(0, 2, 1))) if ".experts." in n else t
        for n, t in tensors.items()
    }
    write_safetensors(stacked / SINGLE, turned)
    with pytest.raises(UnsupportedCheckpoint, match="gate_up_proj"):
        open_checkpoint(stacked)


def test_one_expert_too_many_by_itself_is_refused(tmp_path: Path) -> None:
    plain = make_qwen3_moe(tmp_path / "plain")
    stacked = stack(plain, tmp_path / "stacked", 16)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    both = read_safetensors(stacked / SINGLE) | {name: read_safetensors(plain / SINGLE)[name]}
    write_safetensors(stacked / SINGLE, both)
    with pytest.raises(UnsupportedCheckpoint, match=r"experts\.3\.up_proj"):
        open_checkpoint(stacked)


def test_a_window_in_no_layer_is_accepted(tmp_path: Path) -> None:
    model = write_synthetic(tmp_path / "m", qwen3_config())
    for changes in (
        {"sliding_window": None, "max_window_layers": 0},
        {"sliding_window": 16, "max_window_layers": 1},
        {"sliding_window": 64, "max_window_layers": 0},
        {"sliding_window": 16, "max_window_layers": 0, "layer_types": ["full_attention"]},
    ):
        config = qwen3_config(use_sliding_window=True, **changes)
        (model / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(model).tensors

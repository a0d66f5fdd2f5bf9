"""Attention that no published family here has, by its description: windows in some layers, queries and keys
without a norm, biases without one on the output.  Qwen2 in transformers has all three."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import msconv.families
from msconv.families import configure
from msconv.families.config import Family, Reader
from msconv.families.qwen3 import QWEN3
from msconv.graph.spec import CannotCompute, Local
from msconv.layout.cuts import Mesh
from msconv.layout.model import Table
from msconv.steps.compile import compile_graphs
from msconv.verify.prove import prove
from msconv_runtime import Session
from msconv_runtime.errors import CheckpointError
from msconv_runtime.roles import MIXED, PREFILL
from msconv_runtime.targets import CPU, TARGETS
from tests.conversions import convert
from tests.onnx_files.making import FIXED, every_layout, proved

WINDOW, LAYERS, FIRST = 24, 4, 2
WRONG = ({"windows": ()}, {"windows": (None, None, None, WINDOW)}, {"output_bias": True})
LACKING = ("q_norm.weight", "k_norm.weight", "o_proj.bias")


def read(r: Reader, layers: int) -> dict[str, Any]:
    """What the family has; that its configuration says so is no problem."""
    r.problems = [p for p in r.problems if "window" not in p and "full_attention" not in p]
    return {
        "windows": tuple(WINDOW if i >= FIRST else None for i in range(layers)),
        "qk_norm": False,
        "attention_bias": True,
        "output_bias": False,
    }


WINDOWED = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=Table(
        tuple(rule for rule in QWEN3.table.rules if not rule.dst.endswith(LACKING)),
        QWEN3.table.drops,
    ),
    read=read,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=503,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=FIRST,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("model") / "qwen2"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.setattr(msconv.families, "FAMILIES", (*msconv.families.FAMILIES, WINDOWED))
    return WINDOWED


def artifact(model: Path, root: Path, tp: int, tell: Callable[[str], None]) -> Path:
    convert(model, root, tp)
    compile_graphs(root, "cpu", tell)
    return root


@pytest.mark.slow
def test_a_window_in_some_layers_is_proven_on_a_cpu(model: Path, windowed: Family, tmp_path: Path) -> None:
    """In MindSpore: prompts and chunks longer than the window, decoding past it."""
    told: list[str] = []
    root = artifact(model, tmp_path / "artifact", 1, told.append)
    assert told == [
        f"left out: cpu {role} compiled: the compiled kernels do not compute a window of attention or queries and "
        "keys without a norm."
        for role in ("mixed", "verify")
    ]
    assert sorted(Session(root).graphs.entries) == ["decode", "prefill", "verify"]
    assert prove(root, "cpu", model).ok


@every_layout
def test_a_window_in_some_layers_is_proven_in_onnx_files(model: Path, windowed: Family, tmp_path: Path) -> None:
    convert(model, tmp_path / "artifact")
    compile_graphs(tmp_path / "artifact", "onnx", fixed=FIXED)
    proved(model, tmp_path / "artifact")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_description_that_is_not_the_models_is_seen(
    model: Path, windowed: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    """By the proof of two ranks, in the interpreter; a weight that is not stored already when graphs are made."""
    root = artifact(model, tmp_path / "right", 2, lambda _: None)
    assert prove(root, "cpu", model).ok
    false = replace(WINDOWED, read=lambda r, layers: read(r, layers) | wrong)
    monkeypatch.setattr(msconv.families, "FAMILIES", (false,))
    if "output_bias" in wrong:
        with pytest.raises(Exception, match=r"o_proj\.bias"):
            compile_graphs(root, "cpu", lambda _: None)
        return
    compile_graphs(root, "cpu", lambda _: None)
    proof = prove(root, "cpu", model)
    assert not proof.ok
    place = "model.layers.2.self_attn"
    assert proof.comparison.first.startswith(place), proof.comparison.first


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("ascend")])
def test_operations_without_windows_refuse_by_name(model: Path, windowed: Family, target: str) -> None:
    from msconv.graph.operations import operations_for

    config = configure(json.loads((model / "config.json").read_text()), "config.json")[1]
    with pytest.raises(CannotCompute, match=f"{target} prefill: its attention has no window, .* 24 positions"):
        operations_for(Local(config, Mesh(1), TARGETS[target], PREFILL))
    operations_for(Local(replace(config, windows=()), Mesh(1), TARGETS[target], PREFILL))


def test_compiled_kernels_are_not_left_out_unheard(model: Path, windowed: Family, tmp_path: Path) -> None:
    from msconv.graph.operations import operations_for

    config = configure(json.loads((model / "config.json").read_text()), "config.json")[1]
    with pytest.raises(CannotCompute, match="a window of attention or queries and keys without a norm"):
        operations_for(Local(config, Mesh(1), CPU, MIXED, "compiled"))
    convert(model, tmp_path / "artifact")
    with pytest.raises(CannotCompute, match="compiled kernels do not compute"):
        compile_graphs(tmp_path / "artifact", "cpu")


def test_published_families_refuse_windows_as_before(tmp_path: Path) -> None:
    from tests.synthetic import qwen3_config

    for changes in ({"use_sliding_window": True}, {"layer_types": ["sliding_attention"]}):
        with pytest.raises(CheckpointError, match=r"sliding_window|layer_types"):
            configure(qwen3_config(**changes), "config.json")

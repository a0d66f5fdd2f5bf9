"""Checkpoints in the form that ModelSlim writes, made of plain ones: its arithmetic, names and files.

What each tensor is called and made of follows msmodelslim 26.1's own output; tests/quant/test_modelslim_writer.py
holds the layout of a sample's description against it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?$")
FLOAT = re.compile(r"kv_b_proj")
STEM = "quant_model_weights"
NORMS = ("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm")
Kind = Callable[[str], str]  # a linear's name -> its type in the description


def dynamic(_name: str) -> str:
    return "W8A8_DYNAMIC"


def static(_name: str) -> str:
    return "W8A8"


def mixed(name: str) -> str:
    """As ModelSlim's own recipes for models with experts: attention static, all else a scale a token."""
    return "W8A8" if ".self_attn." in name else "W8A8_DYNAMIC"


def write_modelslim(
    source: Path, directory: Path, kind: Kind = dynamic, shifted: bool = False, seed: int = 0
) -> Path:
    """Quantise a plain checkpoint, stored in bfloat16.  `shifted`: norms get biases, and products into the
    residual stream a bias within their quant_bias, as methods that shift outliers leave them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = {n: t.to(torch.bfloat16) for n, t in _published(model).items()}
    if shifted:
        for name in [n for n in tensors if n.removesuffix(".weight").endswith(NORMS)]:
            tensors[name.replace(".weight", ".bias")] = torch.randn(tensors[name].shape).to(torch.bfloat16) * 0.2
    ranges = _ranges(model, tensors)
    stored: dict[str, torch.Tensor] = {}
    types: dict[str, str] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        chosen = kind(module) if LINEAR.fullmatch(module) and not FLOAT.search(module) else "FLOAT"
        made = {name: tensor}
        if chosen == "W8A8_DYNAMIC":
            codes, scale = quantise(tensor)
            made = {name: codes, name + "_scale": scale.float(), name + "_offset": torch.zeros_like(scale).float()}
        elif chosen == "W8A8":
            bias = torch.randn(len(tensor)) * 0.05 if shifted and module.endswith("o_proj") else None
            made = _static(module, tensor, ranges[module], bias)
        stored |= made
        types |= dict.fromkeys(made, chosen)
    return _write(source, directory, stored, types)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, K] bfloat16 -> codes and scales [O, 1], all of it in bfloat16: so that -128 comes up."""
    scale = (weight.abs().amax(1, keepdim=True).float() / 127).to(weight.dtype)
    return (weight / scale).float().round().clamp(-128, 127).to(torch.int8), scale


def _static(
    module: str, weight: torch.Tensor, between: tuple[float, float], bias: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    low, high = min(between[0], 0.0), max(between[1], 0.0)
    input_scale = torch.tensor([(high - low) / 255])
    offset = (-low / input_scale).round() - 128
    codes, scale = quantise(weight)
    deq = (input_scale * scale.float()).to(torch.bfloat16).float().reshape(-1)
    total = -codes.long().sum(1) * int(offset)
    if bias is not None:
        total = total + (bias / deq).round().long()
    return {
        f"{module}.weight": codes,
        f"{module}.quant_bias": total.to(torch.int32),
        f"{module}.input_scale": input_scale,
        f"{module}.input_offset": offset,
        f"{module}.deq_scale": deq,
    }


def _published(model: Any) -> dict[str, torch.Tensor]:
    """Weights under the published names: each expert's matrices by themselves."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for i, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + str(i)
                found |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            found |= {f"{prefix}{i}.down_proj.weight": matrix for i, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    return {name: tensor.clone() for name, tensor in found.items()}


def _ranges(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """The least and largest input of each linear, for random tokens."""
    found: dict[str, tuple[float, float]] = {}

    def see(name: str) -> Any:
        def hook(_module: Any, inputs: Any) -> None:
            found[name] = (float(inputs[0].min()), float(inputs[0].max()))

        return hook

    def shift(bias: torch.Tensor) -> Any:
        return lambda _module, _inputs, out: out + bias

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(see(name))
        elif name + ".bias" in tensors:
            module.register_forward_hook(shift(tensors[name + ".bias"].float()))
    with torch.no_grad():
        model(torch.randint(0, model.config.vocab_size, (4, 24)))
    return found


def _write(source: Path, directory: Path, stored: dict[str, torch.Tensor], types: dict[str, str]) -> Path:
    directory.mkdir(parents=True)
    shutil.copy(source / "config.json", directory)
    file = f"{STEM}-00001-of-00001.safetensors"
    save_file({n: t.contiguous() for n, t in stored.items()}, directory / file)
    size = sum(t.nbytes for t in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(stored, file)}
    (directory / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    one = next(iter({t for t in types.values() if t != "FLOAT"}), "FLOAT")
    description = {
        **types,
        "version": "1.0.0",
        "model_quant_type": one,
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    (directory / "quant_model_description.json").write_text(json.dumps(description))
    assert not np.any([t.isnan().any() for t in stored.values() if t.is_floating_point()])
    return directory

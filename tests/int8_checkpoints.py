"""Checkpoints in int8 as ModelSlim and compressed-tensors write them, made with numpy alone.

`types` says of each matrix which of ModelSlim's types it gets; the description, the names and the shapes of what
stands beside codes are those of ModelSlim 26.1.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import Bits, Stored, read_checkpoint, write_safetensors
from tests.moe_checkpoints import dequantise, widen
from tests.synthetic import qwen3_config, qwen3_shapes

DESCRIPTION = "quant_model_description.json"
LINEAR = re.compile(r"^(model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?)\.weight$")
SMALLEST = np.float32(2.0**-126)
Floats = NDArray[np.float32]
Types = Callable[[str], str]
Tensors = dict[str, Stored]


def all_dynamic(name: str) -> str:
    return "FLOAT" if "kv_b_proj" in name else "W8A8_DYNAMIC"


def static_attention(name: str) -> str:
    """As ModelSlim's recipes for models with experts: attention static, experts dynamic."""
    return "FLOAT" if "kv_b_proj" in name else "W8A8" if ".self_attn." in name else "W8A8_DYNAMIC"


def all_static(name: str) -> str:
    return "FLOAT" if "kv_b_proj" in name else "W8A8"


def all_mix(name: str) -> str:
    return "FLOAT" if "kv_b_proj" in name else "W8A8_MIX"


def quantised(values: Floats) -> tuple[NDArray[np.int8], Floats]:
    """A row's scale is its largest magnitude / 127 as bfloat16; its codes are made with that: [O, K], [O, 1]."""
    largest = np.abs(values).max(1, keepdims=True)
    scales = (largest / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float32)
    scales = np.maximum(scales, SMALLEST)
    codes = np.clip(np.rint(values / scales), -127, 127).astype(np.int8)
    return codes, scales


@dataclass(frozen=True)
class Form:
    """What a ModelSlim checkpoint has besides.  `bits64`: deq_scale as int64 with float32's bits, as for float16
    models.  `biases`: static matrices have one, in quant_bias.  `shifted`: norms have a bias.  `reaches`: one
    code is -128, as ModelSlim's own rounding makes.  `stem`: of the files' names.  `extra`: of the description."""

    reaches: bool = True
    bits64: bool = False
    biases: bool = False
    shifted: bool = False
    stem: str = "quant_model_weights"
    extra: dict[str, Any] = field(default_factory=dict)


def modelslim(
    source: Path, directory: Path, types: Types = all_dynamic, form: Form = Form(), seed: int = 0
) -> Path:
    """A copy of a checkpoint of values, quantised."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    described: dict[str, str] = {}
    offsets: dict[str, tuple[float, int]] = {}  # by what the input is shared by
    for name, tensor in read_checkpoint(source).items():
        match = LINEAR.match(name)
        kind = types(name) if match else "FLOAT"
        made = {name: tensor}
        if match and kind != "FLOAT":
            shared = re.sub(r"\.(q|k|v|gate|up)_proj$", ".in", match[1])
            scale, offset = offsets.setdefault(shared, (float(rng.uniform(0.01, 0.1)), int(rng.integers(-90, 90))))
            made = _linear(match[1], widen(tensor), kind, scale, offset, form, rng)
        tensors |= made
        described |= dict.fromkeys(made, kind)
    if form.shifted:
        for name in [n for n in tensors if n.endswith("layernorm.weight")]:
            bias = rng.normal(0, 0.1, tensors[name].bits.shape).astype(np.float32)
            tensors[name.replace(".weight", ".bias")] = _like(bias, tensors[name].code)
            described[name.replace(".weight", ".bias")] = "FLOAT"
    directory.mkdir(parents=True)
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    head = {"version": "1.0.0", "model_quant_type": "W8A8", "metadata": {}, "group_size": 0, "optional": {}}
    (directory / DESCRIPTION).write_text(json.dumps({**head, **described, **form.extra}))
    write_shards(directory, tensors, form.stem)
    return directory


def write_shards(directory: Path, tensors: Tensors, stem: str = "quant_model_weights") -> None:
    """Two shards, and the index that names them."""
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number in (1, 2):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        part = {n: tensors[n] for n in names[number - 1 :: 2]}  # scales seldom lie beside their codes
        write_safetensors(directory / file, part)
        index |= dict.fromkeys(part, file)
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def dense_checkpoint(directory: Path, code: str = "BF16", seed: int = 0, **changes: Any) -> Path:
    """A Qwen3 of random values: eight heads, two of keys, so that ranks share those."""
    sizes = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = qwen3_config(**{**sizes, "vocab_size": 203, **changes})
    rng = np.random.default_rng(seed)
    shapes = qwen3_shapes(config)
    if config.get("attention_bias"):
        rows = {n: shape[0] for n, shape in shapes.items() if ".self_attn." in n and n.endswith("_proj.weight")}
        shapes |= {n.replace(".weight", ".bias"): (size,) for n, size in rows.items()}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {n: _like(rng.normal(0, 0.5, shape).astype(np.float32), code) for n, shape in shapes.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def compressed_tensors(source: Path, directory: Path) -> Path:
    """A copy of a checkpoint of values, as llm-compressor quantises it."""
    tensors: Tensors = {}
    for name, tensor in read_checkpoint(source).items():
        tensors[name] = tensor
        if LINEAR.match(name) and "kv_b_proj" not in name:
            codes, scales = quantised(widen(tensor))
            tensors[name] = Stored("I8", codes)
            tensors[name + "_scale"] = _like(scales, "BF16")
    directory.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = COMPRESSED
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
}


def values_of(tensors: Tensors) -> Tensors:
    """What a checkpoint's tensors stand for: codes times the scale of their row (of experts, [E, in, out] and
    [E, 1, out], just so), in float32; without what stands beside them."""
    out: Tensors = {}
    beside = (".weight_scale", ".weight_offset", ".deq_scale", ".quant_bias", ".input_scale", ".input_offset")
    for name, tensor in tensors.items():
        if name.endswith(beside):
            continue
        out[name] = tensor
        module = name.removesuffix(".weight")
        if tensor.code != "I8":
            if tensor.code in ("BF16", "F16"):
                out[name] = Stored("F32", widen(tensor).view(np.uint32))
            continue
        found = tensors.get(name + "_scale") or tensors[module + ".deq_scale"]
        scales = numbers(found)
        product = tensor.bits.astype(np.float32) * (scales if scales.ndim > 1 else scales[:, None])
        out[name] = Stored("F32", product.view(np.uint32))
    return out


def numbers(tensor: Stored) -> Floats:
    """A scale's numbers, however they are stored."""
    if tensor.code == "I64":
        return tensor.bits.astype(np.uint32).view(np.float32)
    return widen(tensor)


def as_values(source: Path, directory: Path, block: tuple[int, int], code: str = "BF16") -> Path:
    """An FP8 checkpoint as values: matrices that will be quantised in float32, without rounding them to another
    type first; all others as conversion decodes them, in the type of `code`."""
    stored = read_checkpoint(source)
    tensors: Tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        tensors[name] = tensor
        if tensor.code == "F8_E4M3":
            values = dequantise(tensor.bits, stored[name + "_scale_inv"].bits, block)
            tensors[name] = _like(values, code if "kv_b_proj" in name else "F32")
    directory.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def _linear(
    module: str, values: Floats, kind: str, scale: float, offset: int, form: Form, rng: np.random.Generator
) -> Tensors:
    codes, scales = quantised(values)
    if form.reaches:
        codes[0, 0] = -128
    made = {module + ".weight": Stored("I8", codes)}
    if kind != "W8A8":
        made[module + ".weight_scale"] = Stored("F32", scales.view(np.uint32))
        made[module + ".weight_offset"] = Stored("F32", np.zeros_like(scales).view(np.uint32))
    if kind in ("W8A8", "W8A8_MIX"):
        deq = (np.float32(scale) * scales[:, 0]).astype(ml_dtypes.bfloat16).astype(np.float32)
        bias = -codes.sum(1, dtype=np.int64) * offset
        if form.biases:
            bias += rng.integers(-1000, 1000, len(bias))
        made[module + ".deq_scale"] = Stored("F32", deq.view(np.uint32))
        if form.bits64:
            made[module + ".deq_scale"] = Stored("I64", deq.view(np.uint32).astype(np.int64))
        made[module + ".quant_bias"] = Stored("I32", bias.astype(np.int32).view(np.uint32))
        made[module + ".input_scale"] = _one(scale)
        made[module + ".input_offset"] = _one(offset)
    return made


def _one(value: float) -> Stored:
    return Stored("F32", np.array([value], np.float32).view(np.uint32))


def _like(values: Floats, code: str) -> Stored:
    kinds: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    bits: Bits = values.astype(kinds[code]).view(np.uint32 if code == "F32" else np.uint16)
    return Stored(code, bits)

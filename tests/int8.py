"""Small models whose matrices are int8: what their artifacts store, by name, and random weights of a rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from msconv.families.config import DecoderConfig
from msconv.quant.w8a8 import W8A8Dynamic, W8A8Static

FORMATS = (W8A8Dynamic(), W8A8Static())
SCALE = "_scale"
STATIC = (".deq_scale", ".quant_bias", ".input_scale", ".input_offset")
QUANTISED = re.compile(r"layers\.\d+\..*_proj(_with_mqa)?\.weight$")
LEFT = re.compile(r"kv_b_proj|mlp\.gate\.")
NORMS = re.compile(r"layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.(q|kv)_a_layernorm)\.bias$")
KINDS = ("dynamic", "static", "mixed")  # mixed: attention static, all else dynamic


def kind_of(matrix: str, kind: str) -> str:
    """How the matrix of this name is kept: `dynamic`, `static`, or "" for values."""
    if not QUANTISED.search(matrix) or LEFT.search(matrix):
        return ""
    if kind == "mixed":
        return "static" if "self_attn" in matrix else "dynamic"
    return "dynamic" if "mlp.experts" in matrix else kind


class Int8Types(dict[str, str]):
    """The stored type of every tensor of an artifact, whatever its name."""

    def __init__(self, kind: str, shifted: bool = False) -> None:
        super().__init__()
        self.kind, self.shifted = kind, shifted

    def get(self, name: str, default: object = None) -> str:  # type: ignore[override]
        if name.endswith(".quant_bias"):
            return "int32"
        if name.endswith((".weight_scale", *STATIC)):
            return "float32"
        return "int8" if name.endswith(".weight") and kind_of(name, self.kind) else "bfloat16"

    def __contains__(self, name: object) -> bool:
        text = str(name)
        if text.endswith(".weight_scale"):
            return kind_of(text.removesuffix(SCALE), self.kind) == "dynamic"
        if text.endswith(STATIC):
            return kind_of(text.rpartition(".")[0] + ".weight", self.kind) == "static"
        return self.shifted if NORMS.search(text) else text.endswith(".weight")

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("the names are not listed")


def quantised(config: DecoderConfig) -> DecoderConfig:
    return replace(config, formats=FORMATS)


class RandomWeights:
    """Weights of one rank that a graph asks for, as an artifact stores them; equal on all ranks where they must
    be.  `declared`: shapes of the graph's parameters, by name."""

    def __init__(self, declared: Mapping[str, tuple[int, ...]], rank: int, ep_rank: int, experts: int) -> None:
        self.declared, self.rank = declared, rank
        self.experts_from = ep_rank * experts

    def get(self, name: str, declared: torch.dtype | None) -> torch.Tensor:
        found = self.stored(name)
        if declared == torch.int64:
            return found.view(torch.int32).long()
        return found

    def stored(self, name: str) -> torch.Tensor:
        shape = self.declared[name]
        own = "_norm" in name or "layernorm" in name or "norm.weight" in name or ".gate." in name
        seed = [*name.encode(), 0 if own or name.endswith((".input_scale", ".input_offset")) else self.rank]
        rng = np.random.default_rng(seed)
        if name == "vocab_start":
            return torch.tensor([self.rank * self.declared["model.embed_tokens.weight"][0]], dtype=torch.int32)
        if name == "expert_start":
            return torch.tensor([self.experts_from], dtype=torch.int32)
        if name == "rank_onehot":
            return torch.eye(shape[0])[self.rank].reshape(shape)
        if name.endswith(".quant_bias"):
            return torch.from_numpy(rng.integers(-2000, 2000, shape, dtype=np.int32))
        if name.endswith((SCALE, ".deq_scale")) and not name.endswith(".input_scale"):
            values = rng.uniform(0.5, 1.5, shape).astype(np.float32) * np.float32(0.002)
            return torch.from_numpy(values).bfloat16().float()
        if name.endswith(".input_scale"):
            return torch.tensor([0.02 + 0.01 * rng.random()], dtype=torch.float32)
        if name.endswith(".input_offset"):
            return torch.tensor([float(rng.integers(-20, 20))])
        return self.values(name, shape, rng)

    def values(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
        if self.is_int8(name):
            return torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))
        if name.endswith("norm.weight"):
            return torch.from_numpy(rng.uniform(0.5, 1.5, shape).astype(np.float32)).bfloat16().float()
        return torch.from_numpy(rng.normal(0, 0.15, shape).astype(np.float32)).bfloat16().float()

    def is_int8(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        return name + SCALE in self.declared or (
            name.endswith(".weight") and module + ".deq_scale" in self.declared
        )

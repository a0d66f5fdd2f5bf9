"""Small models whose matrices are int8: what their artifacts store, by name, and random weights of a rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msconv.families.config import DecoderConfig
from msconv.quant.w8a8 import W8A8Dynamic, W8A8Static

FORMATS = (W8A8Dynamic(), W8A8Static())
SCALE = "_scale"
STATIC = (".deq_scale", ".quant_bias", ".input_scale", ".input_offset")
QUANTISED = re.compile(r"layers\.\d+\..*_proj(_with_mqa)?\.weight$")
LEFT = re.compile(r"kv_b_proj|mlp\.gate\.")
NORMS = re.compile(r"layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.(q|kv)_a_layernorm)\.bias$")
ON_ALL_RANKS = re.compile(r"norm|\.gate\.|input_scale|input_offset|q_a_proj|kv_a_proj|o_proj\.bias")
Array = NDArray[Any]
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
    be.  `declared`: shapes of the graphs' parameters, by name.  `start`: the rank's first expert."""

    def __init__(self, declared: Mapping[str, tuple[int, ...]], rank: int, start: int) -> None:
        self.declared, self.rank, self.start = declared, rank, start
        self.made: dict[str, torch.Tensor] = {}

    def get(self, name: str, declared: torch.dtype | None) -> torch.Tensor:
        """In float32, codes and whole numbers as they are; scales that a graph takes as bits, as bits."""
        found = self.stored(name)
        return found.view(torch.int32).long() if declared == torch.int64 else found

    def of(self, name: str) -> Array | None:
        """float64, or None if there is none of this name."""
        return self.stored(name).double().numpy() if name in self.declared else None

    def stored(self, name: str) -> torch.Tensor:
        if name not in self.made:
            self.made[name] = self._make(name, self.declared[name])
        return self.made[name]

    def _make(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        rng = np.random.default_rng([0 if ON_ALL_RANKS.search(name) else self.rank, *name.encode()])
        if name == "vocab_start":
            return torch.tensor([self.rank * self.declared["model.embed_tokens.weight"][0]], dtype=torch.int32)
        if name == "expert_start":
            return torch.tensor([self.start], dtype=torch.int32)
        if name == "rank_onehot":
            return torch.eye(shape[0])[self.rank].reshape(shape)
        if name.endswith(".quant_bias"):
            return torch.from_numpy(rng.integers(-2000, 2000, shape, dtype=np.int32))
        if name.endswith(".input_offset"):
            return torch.tensor([float(rng.integers(-20, 20))])
        if name + SCALE in self.declared or name.replace(".weight", ".deq_scale") in self.declared.keys() - {name}:
            return torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))
        if name.endswith((".weight_scale", ".deq_scale")):
            values = rng.uniform(0.5, 1.5, shape) * (0.0012 if name.endswith(".weight_scale") else 3e-5)
        elif name.endswith((".input_scale", "norm.weight")):
            values = rng.uniform(0.5, 1.5, shape) * (0.03 if name.endswith("scale") else 1)
        else:
            values = rng.normal(0, 0.15, shape)
        return torch.from_numpy(values.astype(np.float32)).bfloat16().float()  # as a bfloat16 model has them

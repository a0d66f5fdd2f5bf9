"""A checkpoint's matrices as int8: a quantised source's as they are, another's quantised here once more.

Names are those of the checkpoint's tensors, and what ModelSlim's description says is read anew.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from safetensors import safe_open

from msconv_runtime.artifact import Manifest
from msconv_runtime.errors import VerificationFailed

from ...checkpoint.directory import Checkpoint
from ..source_weights import SourceWeights
from .arithmetic import quantise_rows

Kind = Literal["dynamic", "static"]
DESCRIPTION = "quant_model_description.json"
VALUES = ("lm_head", ".kv_b_proj", ".mlp.gate")  # linears that stay as they are
OF_STATIC = ("deq_scale", "quant_bias", "input_scale", "input_offset")


class QuantisedWeights(SourceWeights):
    """`is_made`: the codes are ours, made while converting; else they are the source's."""

    def __init__(self, checkpoint: Checkpoint, manifests: list[Manifest]) -> None:
        super().__init__(checkpoint, manifests)
        path = checkpoint.root / DESCRIPTION
        self.described: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.is_made = not any(info.dtype == "int8" for info in checkpoint.tensors.values())
        self._ready: dict[str, Any] = {}

    def kind(self, module: str) -> Kind | None:
        """How a linear is quantised; None if it keeps its values."""
        name = module + ".weight"
        if self.is_made:
            return None if module.endswith(VALUES) else "dynamic"
        info = self.checkpoint.find(name)
        if info is None or info.dtype != "int8":
            return None
        if self.described:
            return "static" if self.described.get(name) == "W8A8" else "dynamic"
        return "dynamic" if self.checkpoint.find(name + "_scale") else "static"

    def has_experts(self, prefix: str) -> bool:
        """Whether the experts `model.layers.1.mlp.experts.` are quantised."""
        return self.kind(prefix + "0.gate_proj") is not None

    def codes(self, matrix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [O, K] and float32 scales [O, 1] of a matrix with a scale a token."""
        if self.is_made:
            self._require(matrix)
            return quantise_rows(self._values(matrix))
        return self.raw(matrix), self.raw(matrix + "_scale").to(torch.float32)

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it is stored; whole numbers that have the bits of float32, as that."""
        info = self._require(name)
        with safe_open(self.checkpoint.files[info.file].path, framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(self.checkpoint.stored.get(name, name)).clone()
        if found.dtype == torch.int64:
            low = torch.where(found >= 2**31, found - 2**32, found)
            found = low.to(torch.int32).view(torch.float32)
        return found

    def get(self, name: str, like: Any = None) -> Any:
        """As SourceWeights'; codes where the module has int8, and what belongs to them."""
        if name in self._ready:
            return self._ready.pop(name)
        module, _, leaf = name.rpartition(".")
        if leaf in OF_STATIC:
            found = self.raw(name)
            return found if found.dtype == torch.int32 else found.to(torch.float32)
        if like is not None and like.dtype == torch.int8:
            if leaf in ("gate_up_proj", "down_proj"):
                codes, scales = self._stack(module + ".", leaf, like.shape)
                self._ready[name + "_scale"] = scales
                return codes
            if self.kind(module) == "static":
                return self.raw(name)
            codes, scales = self.codes(name)
            self._ready[name + "_scale"] = scales
            return codes
        return super().get(name, like)

    def _stack(self, prefix: str, leaf: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        codes = torch.empty(shape, dtype=torch.int8)
        scales = torch.empty((*shape[:2], 1))
        for expert in range(shape[0]):
            found = [self.codes(f"{prefix}{expert}.{part}.weight") for part in parts]
            codes[expert] = torch.cat([c for c, _ in found])
            scales[expert] = torch.cat([s for _, s in found])
        return codes, scales

    def _values(self, name: str) -> torch.Tensor:
        """A matrix in float32, not rounded: codes of FP8 times their scales."""
        found = self.published(name, lambda value: value)
        if not isinstance(found, torch.Tensor) or not found.isfinite().all():
            raise VerificationFailed(f"{self.checkpoint.root}: {name} holds values that are no finite numbers.")
        return found

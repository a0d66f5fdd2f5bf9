"""A checkpoint's weights for the reference: read apart from the family tables, by the names of transformers."""

from __future__ import annotations

from collections import ChainMap
from functools import partial
from typing import Any

from msconv_runtime.artifact import Manifest
from msconv_runtime.errors import VerificationFailed

from ..checkpoint.directory import Checkpoint
from ..quant import format_of
from .arena import Arena

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class SourceWeights:
    """A checkpoint's tensors by the names of transformers' modules, in float32."""

    def __init__(self, checkpoint: Checkpoint, manifests: list[Manifest]) -> None:
        """Values are rounded to the types of each manifest in turn."""
        self.checkpoint = checkpoint
        self.arena: Arena | None = None  # where tensors are put while there is one
        stored = [m.weights for m in manifests if m.weights is not None]
        self.types = [({t.name: t.dtype for t in w.tensors}, w.dtype) for w in stored]

    def get(self, name: str, like: Any = None) -> Any:
        """`like`: what the module has in its place; experts are stacked to its shape."""
        import torch

        if name == "lm_head.weight" and self.checkpoint.config.tied:
            name = "model.embed_tokens.weight"
        if self.checkpoint.find(name):
            return self._one(name)
        if like is not None and not like.numel():  # no shared experts: an MLP of width 0
            return torch.empty(like.shape)
        for fused, parts in FUSED.items():
            if like is not None and name.endswith(f"mlp.experts.{fused}"):
                out = torch.empty(like.shape, dtype=torch.float32)
                prefix = name.removesuffix(fused)
                for expert, place in enumerate(out):
                    pieces = [self._one(f"{prefix}{expert}.{part}.weight") for part in parts]
                    torch.cat(pieces, out=place)
                return out
        raise VerificationFailed(f"{self.checkpoint.root}: {name} is not in the checkpoint.")

    def _one(self, name: str) -> Any:
        return self.published(name, partial(self._rounded, name))

    def _rounded(self, name: str, value: Any) -> Any:
        import torch

        for by_name, default in self.types:
            value = value.to(getattr(torch, by_name.get(name, default))).to(torch.float32)
        return value

    def rows(self, name: str, begin: int, end: int) -> Any:
        """Rows [begin, end) of a matrix that is stored as values."""
        import torch
        from safetensors import safe_open

        info = self._require(name)
        with safe_open(self.checkpoint.files[info.file].path, framework="pt") as opened:
            stored = opened.get_slice(self.checkpoint.stored.get(name, name))[begin:end]
        return self._rounded(name, stored.to(torch.float32))

    def published(self, name: str, rounds: Any) -> Any:
        """A tensor's values in float32, decoded by its format's published rule, through `rounds`."""
        info = self._require(name)
        if {by_name.get(name, default) for by_name, default in self.types} <= {info.dtype}:
            rounds = _unchanged  # by rounding to its own type; and it stays in the arena
        headers = ChainMap(self.checkpoint.tensors, dict(self.checkpoint.stacked))
        stored = format_of(name, headers, self.checkpoint.config.formats)
        if stored:
            return stored.reference(name, self._read, rounds)
        return rounds(self._read(name))

    def _require(self, name: str) -> Any:
        info = self.checkpoint.find(name)
        if info is None:
            raise VerificationFailed(f"{self.checkpoint.root}: {name} is not in the checkpoint.")
        return info

    def _read(self, name: str) -> Any:
        """A tensor in float32."""
        import torch
        from safetensors import safe_open

        info = self._require(name)
        with safe_open(self.checkpoint.files[info.file].path, framework="pt") as opened:  # kept open, pages stay
            stored = opened.get_tensor(self.checkpoint.stored.get(name, name))
            found = self.arena.widened(stored) if self.arena is not None else None
            return stored.to(torch.float32, copy=True) if found is None else found


def _unchanged(value: Any) -> Any:
    return value


class ExpertsOnUse:
    """A layer's experts as transformers' module takes them, one after another: [i] is the i-th, [O, I], read then.
    Each is asked for once in a pass."""

    def __init__(self, weights: SourceWeights, name: str) -> None:
        """`name`: of the stacked matrix, as transformers has it."""
        self.weights = weights
        self.prefix, _, fused = name.rpartition(".")
        self.parts = FUSED[fused]

    def __getitem__(self, expert: Any) -> Any:
        import torch

        names = [f"{self.prefix}.{int(expert)}.{part}.weight" for part in self.parts]
        return torch.cat([self.weights.get(name) for name in names])

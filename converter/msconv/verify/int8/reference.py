"""The source model with the arithmetic of W8A8: led, rounding by itself, or with the values of its codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from msconv_runtime.artifact import Manifest

from ...checkpoint.directory import Checkpoint
from ..reference import Reference, Trace
from .codes import Record
from .lead import Lead, Verdict
from .modules import QuantisedExperts, QuantisedLinear, shift, stored_name
from .weights import QuantisedWeights


class QuantisedReference(Reference):
    """Rounds activations itself unless it is led.  Ranks that divide the columns of a matrix each round their own:
    answers are those of an artifact with the manifest's tp and ep."""

    weights: QuantisedWeights

    def __init__(self, root: Path, manifest: Manifest, layers: int = 0, bound: Manifest | None = None) -> None:
        self.lead = Lead()
        self.parallel = manifest.parallel
        super().__init__(root, manifest, layers, bound)

    def _weights(self, checkpoint: Checkpoint, manifests: list[Manifest]) -> QuantisedWeights:
        return QuantisedWeights(checkpoint, manifests)

    def _prepare(self, model: Any) -> None:
        tp, ep = self.parallel.tp, self.parallel.ep
        has_heads = self.weights.checkpoint.config.mla is None
        for name, module in list(model.named_modules()):
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, nn.Linear) and module.weight.numel() and (kind := self.weights.kind(name)):
                matrix = stored_name(name, has_heads)
                made: nn.Module = QuantisedLinear(module, matrix, kind == "static", tp, self.lead)
                setattr(model.get_submodule(parent), leaf, made)
            elif name.endswith("mlp.experts") and self.weights.has_experts(name + "."):
                made = QuantisedExperts(module, name + ".", tp // ep, self.lead)
                setattr(model.get_submodule(parent), leaf, made)
            elif leaf.endswith("norm") and self.weights.checkpoint.find(name + ".bias"):
                shift(module)

    def led_traces(self, sequences: list[list[int]], record: Record) -> tuple[list[Trace], Verdict]:
        """As `traces`, with the candidate's codes at ties, and what there was to say of the others."""
        lengths = [len(s) for s in sequences]
        self.lead.begin(record, lengths)
        try:
            traces = self.traces(sequences)
            verdict = self.lead.verdict([t.decided for t in traces], lengths)
        finally:
            self.lead.begin(None)
        return traces, verdict

    def traces_of_values(self, sequences: list[list[int]]) -> list[Trace]:
        """As `traces`, with the values that codes stand for, and activations as they are."""
        changed = [m for m in self.model.modules() if isinstance(m, QuantisedLinear | QuantisedExperts)]
        for module in changed:
            module.as_values = True
        try:
            return self.traces(sequences)
        finally:
            for module in changed:
                module.as_values = False

    def _follower(self, x: Any) -> Any:
        out = super()._follower(x)
        name = f"model.layers.{self.layers}.input_layernorm.bias"
        return out + self.weights.get(name) if self.weights.checkpoint.find(name) else out

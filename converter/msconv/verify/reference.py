"""The reference: transformers' model on the source checkpoint, float32, on the CPU, one layer in memory at a time.

Weights are read here, apart from the family tables: by the names that transformers' modules have, experts and
quantised matrices as published.  What a module wants and the checkpoint lacks is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import Manifest
from msconv_runtime.errors import UsageError, VerificationFailed
from msconv_runtime.vector_math import choose_code

from ..checkpoint.directory import Checkpoint, open_checkpoint
from ..checkpoint.hubs import REPOSITORY
from ..checkpoint.urls import is_url
from ..families import Family
from ..location import open_reference
from ..workspace.state import recorded_source
from .arena import Arena
from .kept import NOTHING
from .reference_pass import Packed, run_layers
from .routing import closeness
from .source_weights import FUSED, ExpertsOnUse, SourceWeights
from .telling import Tell, quietly

Logits = NDArray[np.float32]

ROUTER_TIE = 2e-5  # float32 sums in another order move a router's scores by some 1e-6
LAYER = re.compile(r"model\.layers\.\d+")
KEEP_BYTES = 4 << 30  # a model up to this size stays in memory


@dataclass(frozen=True)
class Trace:
    """One sequence through the reference.  `closest` [T]: how far the router was from choosing other experts.
    `hidden` [T, ...]: the hidden states that the model's graphs give a draft; where there is none, the last norm's
    output.  `streams`: the residual stream that enters each layer, by the name of its first norm, where layers are
    proved each by itself.  `chosen`: each token's experts [T, k], by module."""

    logits: Logits
    probes: dict[str, Logits]
    closest: NDArray[np.float32]
    hidden: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    streams: dict[str, Logits] = field(default_factory=dict)
    chosen: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def decided(self) -> int:
        """Positions before the first whose routing hangs on rounding: those after it may look back at it."""
        tied = np.flatnonzero(self.closest < ROUTER_TIE)
        return int(tied[0]) if len(tied) else len(self.closest)


class Reference:
    """The source model in float32.  Where conversion rounded, its weights are rounded alike, so that what is
    compared is the computation and the layout."""

    def __init__(self, root: Path, manifest: Manifest, layers: int = 0, bound: Manifest | None = None) -> None:
        """`bound`: the manifest with the types in which a server binds the weights, if that rounds once more."""
        import torch

        choose_code()
        self.tell: Tell = quietly
        self.kept = NOTHING  # where what was computed is kept for a run after this one
        self.num_skipped = 0  # leading layers that a pass takes from there
        self.keeps_streams = False  # what enters each layer too
        self.layers = layers
        self.captured = manifest.draft.layers if manifest.draft else []
        checkpoint = open_checkpoint(root, harmless=manifest.model.harmless)
        if manifest.model.config_digest not in (checkpoint.config_digest, checkpoint.bare().config_digest):
            raise VerificationFailed(
                f"{root}: is another model than the artifact was built from ({manifest.model.source}): "
                f"the digests of config.json are {checkpoint.config_digest} and "
                f"{manifest.model.config_digest}.",
                "Give the directory the artifact was converted from with --reference.",
            )
        self.torch = torch
        self.weights = self._weights(checkpoint, [manifest, *([bound] if bound else [])])
        self.moe = checkpoint.config.moe
        model = model_without_weights(root, checkpoint.family, layers)
        with torch.device("meta"):
            if manifest.draft and manifest.draft.is_layer and not layers:  # is not run with the others
                index = model.config.num_hidden_layers
                model.model.layers.append(type(model.model.layers[-1])(model.config, index))
            self._prepare(model)
        self.model = model.eval()
        self.keeps_all = sum(t.nbytes for t in model.state_dict().values()) <= KEEP_BYTES
        for name, module in model.named_modules():
            if not self.keeps_all and name.endswith("mlp.experts"):
                self._read_one_by_one(name, module)
        self._arena = Arena(max(parts_bytes(model).values()))
        for name, module in model.named_modules():
            if name in ("model.embed_tokens", "model.norm", "lm_head") or LAYER.fullmatch(name):
                self.load_on_use(name, module)

    def _weights(self, checkpoint: Checkpoint, manifests: list[Manifest]) -> SourceWeights:
        return SourceWeights(checkpoint, manifests)

    def _prepare(self, model: Any) -> None:
        """Change modules before they have weights."""

    def _read_one_by_one(self, name: str, module: Any) -> None:
        """Experts of large models come when their module takes them, and not all at once."""
        for fused in FUSED:
            if fused in module._parameters and not self.weights.checkpoint.find(f"{name}.{fused}"):
                del module._parameters[fused]
                setattr(module, fused, ExpertsOnUse(self.weights, f"{name}.{fused}"))

    def load_on_use(self, name: str, module: Any) -> None:
        """Its weights come when it is called, and go afterwards."""

        def load(_module: Any, _inputs: Any) -> None:
            if layer := LAYER.fullmatch(name):
                index = int(layer[0].rpartition(".")[2])
                if index < self.num_skipped:
                    return
                self.tell("transformers", index, self.model.config.num_hidden_layers)
            if any(t.is_meta for t in module.state_dict().values()):
                if not self.keeps_all:  # one part at a time has weights
                    self.weights.arena = self._arena
                    self._arena.clear()
                values = {k: self.weights.get(f"{name}.{k}", t) for k, t in module.state_dict().items()}
                self.weights.arena = None
                module.load_state_dict(values, strict=True, assign=True)

        module.register_forward_pre_hook(load)
        if not self.keeps_all:
            module.register_forward_hook(lambda _module, _inputs, _out: module.to("meta") and None)

    def traces(self, sequences: list[list[int]]) -> list[Trace]:
        """Each sequence by itself: logits [T, V], and outputs [T, hidden] of all norms of the residual stream."""
        batch = Packed.of(sequences)
        passed = run_layers(self, batch, self.kept)
        before, last = passed.entering["model.norm"], passed.norms["model.norm"]
        streams = [passed.entering[f"model.layers.{i}.input_layernorm"] for i in self.captured if not self.layers]
        hidden = self.torch.cat(streams, -1) if streams else last
        found = dict(passed.norms)
        if self.layers:
            del found["model.norm"]
            found[f"model.layers.{self.layers}.input_layernorm"] = self._follower(before)
        closest = self.torch.full(batch.ids.shape, float("inf"))
        for distance in passed.closest.values():
            closest = self.torch.minimum(closest, distance.reshape(batch.ids.shape))
        parts = {name: batch.apart(out) for name, out in found.items()}
        entering = passed.entering.items() if self.keeps_streams else ()
        entered = {name: batch.apart(value) for name, value in entering}
        shape = (*batch.ids.shape, -1)
        chosen = {name: batch.apart(ids.reshape(shape)) for name, ids in passed.chosen.items()}
        logits = self._logits_apart(batch.apart(last))
        self._arena.give_back()
        each = zip(logits, batch.apart(closest), batch.apart(hidden), strict=True)
        return [
            Trace(
                of_last,
                {name: out[i].numpy() for name, out in parts.items()},
                of_closest.numpy(),
                of_hidden.numpy(),
                {name: value[i].numpy() for name, value in entered.items()},
                {name: ids[i].numpy() for name, ids in chosen.items()},
            )
            for i, (of_last, of_closest, of_hidden) in enumerate(each)
        ]

    def _logits_apart(self, hidden: list[Any]) -> list[Logits]:
        """Of each sequence; the head is read once."""
        logits = self.logits(self.torch.cat(hidden))
        if self.layers:
            return [logits for _ in hidden]
        return np.split(logits, np.cumsum([len(h) for h in hidden])[:-1])

    def logits(self, hidden: Any) -> Logits:
        if self.layers:
            return np.zeros((0, 0), np.float32)
        with self.torch.no_grad():
            out: Logits = self.model.lm_head(hidden).numpy()
        return out

    def closeness(self, module: Any, logits: Any) -> Any:
        assert self.moe is not None
        return closeness(logits.float(), self.moe, getattr(module, "e_score_correction_bias", None))

    def _follower(self, x: Any) -> Any:
        """The norm that comes after the last of the layers that are looked at."""
        weight = self.weights.get(f"model.layers.{self.layers}.input_layernorm.weight")
        scale = self.torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.model.model.norm.variance_epsilon)
        return x * scale * weight


def model_without_weights(root: Path, family: Family, layers: int = 0) -> Any:
    """transformers' model in float32, its weights nowhere; of the first `layers` only, if that is not 0."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # our own words say what is compared
    transformers_logging.disable_progress_bar()
    config = _configuration(root, family)
    if getattr(config, "quantization_config", None):
        del config.quantization_config  # codes are dequantised by SourceWeights
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def parts_bytes(model: Any) -> dict[str, int]:
    """What each layer, the embedding, the last norm and the head take in float32."""
    sizes: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        layer = LAYER.match(name)
        part = layer[0] if layer else name.rpartition(".")[0]
        sizes[part] = sizes.get(part, 0) + 4 * prod(tensor.shape)
    return sizes


def _configuration(root: Path, family: Family) -> Any:
    """The configuration of the class that transformers has for the family: a model may be published under a type
    that it does not know."""
    from transformers import CONFIG_MAPPING

    raw = json.loads((root / "config.json").read_text())
    return CONFIG_MAPPING[family.name].from_dict({**raw, "model_type": family.name})


def source_of(root: Path, given: str | Path | None) -> Path:
    """The reference directory: given, or the one the artifact was converted from on this machine.  What is on a
    hub is downloaded, if it is not in the cache."""
    if given is not None:
        return open_reference(str(given)).bring()
    recorded = recorded_source(root)
    if REPOSITORY.fullmatch(recorded) or is_url(recorded):
        return open_reference(recorded).bring()
    if not recorded or not Path(recorded, "config.json").is_file():
        raise UsageError(
            f"{root}: the checkpoint it was converted from is not on this machine.",
            "Give its directory with --reference.",
        )
    return Path(recorded)

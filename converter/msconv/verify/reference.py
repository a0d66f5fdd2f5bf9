"""The reference: transformers' model on the source checkpoint, float32, on the CPU, one layer in memory at a time.

Weights are read here, apart from the family tables: by the names that transformers' modules have, experts and
quantised matrices as published.  What a module wants and the checkpoint lacks is an error.
"""

from __future__ import annotations

import json
import re
from collections import ChainMap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import Manifest
from msconv_runtime.errors import EnvironmentProblem, UsageError, VerificationFailed

from ..checkpoint.directory import Checkpoint, open_checkpoint
from ..checkpoint.reference import REPOSITORY
from ..checkpoint.urls import is_url
from ..families import Family
from ..location import open_reference
from ..quant import format_of
from ..workspace.state import recorded_source
from .routing import closeness
from .telling import Tell, quietly

Logits = NDArray[np.float32]

ROUTER_TIE = 2e-5  # float32 sums in another order move a router's scores by some 1e-6
LAYER = re.compile(r"model\.layers\.\d+")
KEEP_BYTES = 4 << 30  # a model up to this size stays in memory


@dataclass(frozen=True)
class Trace:
    """One sequence through the reference.  `closest` [T]: how far the router was from choosing other experts.
    `hidden` [T, ...]: the hidden states that the model's graphs give a draft; where there is none, the last norm's
    output."""

    logits: Logits
    probes: dict[str, Logits]
    closest: NDArray[np.float32]
    hidden: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))

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
        try:
            import torch
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging as transformers_logging
        except ImportError as e:
            raise EnvironmentProblem(
                f"verify needs torch and transformers ({e}).", 'Install them: pip install "msconv[verify]".'
            ) from None
        self.tell: Tell = quietly
        transformers_logging.set_verbosity_error()  # our own words say what is compared
        transformers_logging.disable_progress_bar()
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
        config = _configuration(root, checkpoint.family)
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
            if manifest.draft and manifest.draft.kind == "mtp" and not layers:  # is not run with the others
                index = config.num_hidden_layers
                model.model.layers.append(type(model.model.layers[-1])(config, index))
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        with torch.device("meta"):
            self._prepare(model)
        self.model = model.eval()
        self._keep = sum(t.nbytes for t in model.state_dict().values()) <= KEEP_BYTES
        for name, module in model.named_modules():
            if name in ("model.embed_tokens", "model.norm", "lm_head") or LAYER.fullmatch(name):
                self.load_on_use(name, module)

    def _weights(self, checkpoint: Checkpoint, manifests: list[Manifest]) -> SourceWeights:
        return SourceWeights(checkpoint, manifests)

    def _prepare(self, model: Any) -> None:
        """Change modules before they have weights."""

    def load_on_use(self, name: str, module: Any) -> None:
        """Its weights come when it is called, and go afterwards."""

        def load(_module: Any, _inputs: Any) -> None:
            if layer := LAYER.fullmatch(name):
                self.tell("transformers", int(layer[0].rpartition(".")[2]), self.model.config.num_hidden_layers)
            if any(t.is_meta for t in module.state_dict().values()):
                values = {k: self.weights.get(f"{name}.{k}", t) for k, t in module.state_dict().items()}
                module.load_state_dict(values, strict=True, assign=True)

        module.register_forward_pre_hook(load)
        if not self._keep:
            module.register_forward_hook(lambda _module, _inputs, _out: module.to("meta") and None)

    def traces(self, sequences: list[list[int]]) -> list[Trace]:
        """Each sequence by itself: logits [T, V], and the output [T, hidden] of every norm of the residual stream.

        All run as one batch, filled up on the right: no token looks there."""
        torch = self.torch
        probes: dict[str, Any] = {}
        routed: dict[str, Any] = {}
        hooks = [
            module.register_forward_hook(
                lambda _module, inputs, out, name=name: probes.__setitem__(name, (inputs[0], out))
            )
            for name, module in self.model.named_modules()
            if name.endswith(("input_layernorm", "post_attention_layernorm")) or name == "model.norm"
        ]
        hooks += [
            module.register_forward_hook(
                lambda module, _inputs, out, name=name: routed.__setitem__(name, self.closeness(module, out[0]))
            )
            for name, module in self.model.named_modules()
            if name.endswith("mlp.gate")
        ]
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
        try:
            with torch.no_grad():
                self.model.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        before, last = probes["model.norm"]
        streams = [probes[f"model.layers.{i}.input_layernorm"][0] for i in self.captured if not self.layers]
        hidden = torch.cat(streams, -1) if streams else last
        found = {name: out for name, (_, out) in probes.items()}
        if self.layers:
            del found["model.norm"]
            found[f"model.layers.{self.layers}.input_layernorm"] = self._follower(before)
        closest = torch.full(ids.shape, float("inf"))
        for distance in routed.values():
            closest = torch.minimum(closest, distance.reshape(ids.shape))
        return [
            Trace(
                self.logits(last[i, : len(s)]),
                {name: out[i, : len(s)].numpy() for name, out in found.items()},
                closest[i, : len(s)].numpy(),
                hidden[i, : len(s)].numpy(),
            )
            for i, s in enumerate(sequences)
        ]

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


class SourceWeights:
    """A checkpoint's tensors by the names of transformers' modules, in float32."""

    def __init__(self, checkpoint: Checkpoint, manifests: list[Manifest]) -> None:
        """Values are rounded to the types of each manifest in turn."""
        self.checkpoint = checkpoint
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
        for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            if like is not None and name.endswith(f"mlp.experts.{fused}"):
                out = torch.empty(like.shape, dtype=torch.float32)
                prefix = name.removesuffix(fused)
                for expert, place in enumerate(out):
                    pieces = [self._one(f"{prefix}{expert}.{part}.weight") for part in parts]
                    torch.cat(pieces, out=place)
                return out
        raise VerificationFailed(f"{self.checkpoint.root}: {name} is not in the checkpoint.")

    def _one(self, name: str) -> Any:
        import torch

        def rounds(value: Any) -> Any:
            for by_name, default in self.types:
                value = value.to(getattr(torch, by_name.get(name, default))).to(torch.float32)
            return value

        return self.published(name, rounds)

    def published(self, name: str, rounds: Any) -> Any:
        """A tensor's values in float32, decoded by its format's published rule, through `rounds`."""
        self._require(name)
        headers = ChainMap(self.checkpoint.tensors, dict(self.checkpoint.stacked))
        stored = format_of(name, headers, self.checkpoint.config.formats)
        return stored.reference(name, self._read, rounds) if stored else rounds(self._read(name))

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
            return opened.get_tensor(self.checkpoint.stored.get(name, name)).to(torch.float32, copy=True)


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

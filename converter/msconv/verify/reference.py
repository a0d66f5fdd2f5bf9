"""The reference: transformers on the source checkpoint, float32, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import STATE_DIR, Manifest
from msconv_runtime.errors import EnvironmentProblem, UsageError, VerificationFailed

from ..checkpoint.directory import Checkpoint, open_checkpoint

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Trace:
    """One sequence through the reference."""

    logits: Logits
    probes: dict[str, Logits]


class Reference:
    """The source model in float32.  Where conversion rounded (`--dtype`), its weights are rounded alike, so
    that what is compared is the computation and the layout."""

    def __init__(self, root: Path, manifest: Manifest, layers: int = 0) -> None:
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.utils import logging as transformers_logging
        except ImportError as e:
            raise EnvironmentProblem(
                f"verify needs torch and transformers ({e}).", 'Install them: pip install "msconv[verify]".'
            ) from None
        transformers_logging.set_verbosity_error()  # our own words say what is compared
        transformers_logging.disable_progress_bar()
        checkpoint = open_checkpoint(root)
        if checkpoint.config_digest != manifest.model.config_digest:
            raise VerificationFailed(
                f"{root}: is another model than the artifact was built from ({manifest.model.source}): "
                f"the digests of config.json are {checkpoint.config_digest} and "
                f"{manifest.model.config_digest}.",
                "Give the directory the artifact was converted from with --reference.",
            )
        self._torch = torch
        self.layers = layers
        config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        if layers:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            root,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        ).eval()
        weights = manifest.weights
        self.rounded_to = ""
        if weights is not None and weights.source_dtype != weights.dtype:
            self.rounded_to = weights.dtype
            narrow = getattr(torch, weights.dtype)
            with torch.no_grad():
                for p in self.model.parameters():
                    p.copy_(p.to(narrow).to(torch.float32))
        self._follower = self._follower_norm(checkpoint) if layers else None

    def _follower_norm(self, checkpoint: Checkpoint) -> Any:
        """The norm that comes after the last of the layers that are looked at, from the checkpoint."""
        from safetensors import safe_open

        name = f"model.layers.{self.layers}.input_layernorm.weight"
        file = checkpoint.files[checkpoint.tensors[name].file].path
        with safe_open(file, framework="pt") as f:
            weight = f.get_tensor(name).to(self._torch.float32)
        if self.rounded_to:
            weight = weight.to(getattr(self._torch, self.rounded_to)).to(self._torch.float32)
        return weight

    def trace(self, tokens: list[int]) -> Trace:
        """Logits [T, V] of one sequence, and the output [T, hidden] of every norm of the residual stream."""
        probes: dict[str, Logits] = {}
        if self._follower is not None:
            return Trace(np.zeros((0, 0), np.float32), self._first_layers(tokens))
        hooks = [
            module.register_forward_hook(
                lambda _module, _inputs, out, name=name: probes.__setitem__(name, out[0].numpy())
            )
            for name, module in self.model.named_modules()
            if name.endswith(("input_layernorm", "post_attention_layernorm")) or name == "model.norm"
        ]
        try:
            with self._torch.no_grad():
                logits: Logits = self.model(self._torch.tensor([tokens])).logits[0].numpy()
        finally:
            for hook in hooks:
                hook.remove()
        return Trace(logits, probes)

    def _first_layers(self, tokens: list[int]) -> dict[str, Logits]:
        """The norms of the first layers, and the one that follows them."""
        follower, self._follower = self._follower, None
        last: list[Any] = []
        norm = self.model.model.norm
        hook = norm.register_forward_hook(lambda _module, inputs, _out: last.append(inputs[0][0]))
        try:
            probes = dict(self.trace(tokens).probes)
        finally:
            hook.remove()
            self._follower = follower
        probes.pop("model.norm")
        scale = self._torch.rsqrt(last[0].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        probes[f"model.layers.{self.layers}.input_layernorm"] = (last[0] * scale * follower).numpy()
        return probes


def source_of(root: Path, given: Path | None) -> Path:
    """The reference directory: given, or the one the artifact was converted from on this machine."""
    if given is not None:
        return given
    try:
        recorded = (root / STATE_DIR / "source").read_text().strip()
    except OSError:
        recorded = ""
    if not recorded or not Path(recorded, "config.json").is_file():
        raise UsageError(
            f"{root}: the checkpoint it was converted from is not on this machine.",
            "Give its directory with --reference.",
        )
    return Path(recorded)

"""The reference: transformers on the source checkpoint, float32, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import STATE_DIR, Manifest
from msconv_runtime.errors import EnvironmentProblem, UsageError, VerificationFailed

from ..checkpoint.directory import open_checkpoint

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Trace:
    """One sequence through the reference."""

    logits: Logits
    probes: dict[str, Logits]


class Reference:
    """The source model in float32.  Where conversion rounded (`--dtype`), its weights are rounded alike, so
    that what is compared is the computation and the layout."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as e:
            raise EnvironmentProblem(
                f"verify needs torch and transformers ({e}).", 'Install them: pip install "msconv[verify]".'
            ) from None
        checkpoint = open_checkpoint(root)
        if checkpoint.config_digest != manifest.model.config_digest:
            raise VerificationFailed(
                f"{root}: is another model than the artifact was built from ({manifest.model.source}): "
                f"the digests of config.json are {checkpoint.config_digest} and "
                f"{manifest.model.config_digest}.",
                "Give the directory the artifact was converted from with --reference.",
            )
        self._torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            root,
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

    def trace(self, tokens: list[int]) -> Trace:
        """Logits [T, V] of one sequence, and the output [T, hidden] of every norm of the residual stream."""
        probes: dict[str, Logits] = {}
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

"""A draft of EAGLE3 in torch, from its checkpoint: transformers has no such class, so it is written from the
mathematics of the published modelling code.  Shares nothing with the graphs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msconv_runtime.artifact import Manifest
from msconv_runtime.errors import VerificationFailed

from ..checkpoint.directory import open_checkpoint
from .drafts import States
from .reference import Logits
from .source_weights import SourceWeights


class Eagle3Reference:
    """The draft in float32, its weights rounded as the artifact's are, or as they are without a manifest."""

    def __init__(self, root: Path, manifest: Manifest | None = None) -> None:
        import torch
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self._torch = torch
        checkpoint = open_checkpoint(root, harmless=manifest.model.harmless if manifest else ())
        if manifest is not None and manifest.model.config_digest != checkpoint.config_digest:
            raise VerificationFailed(
                f"{root}: is another draft than the artifact was built from ({manifest.model.source}).",
                "Give the directory the artifact was converted from with --reference.",
            )
        weights = SourceWeights(checkpoint, [manifest] if manifest else [])
        self.weights = {name: weights.get(name) for name in checkpoint.tensors if name not in ("d2t", "t2d")}
        raw = json.loads((root / "config.json").read_text())
        self.config = LlamaConfig.from_dict(raw)
        self.rotation = LlamaRotaryEmbedding(self.config)
        self.vocab, self.draft_vocab = int(raw["vocab_size"]), int(raw["draft_vocab_size"])
        self.hidden = int(self.config.hidden_size)
        self.streams = int(self.weights["fc.weight"].shape[1])

    def run(self, embedded: Any, hidden: Sequence[States]) -> tuple[Logits, States]:
        """A whole sequence: `embedded` [T, hidden], rows of the target's embedding; `hidden`, T vectors, each of
        the target's streams or of one own state.  Logits [T, draft vocabulary], own states [T, hidden]."""
        torch = self._torch
        with torch.no_grad():
            x = torch.zeros(len(hidden), self.hidden)
            wide = [i for i, h in enumerate(hidden) if len(h) == self.streams]
            own = [i for i, h in enumerate(hidden) if len(h) != self.streams]
            if wide:
                x[wide] = self.narrow(torch.from_numpy(np.stack([hidden[i] for i in wide])))
            if own:
                x[own] = torch.from_numpy(np.stack([hidden[i] for i in own]))
            logits, found = self.forward(torch.as_tensor(np.asarray(embedded, np.float32))[None], x[None])
        return logits[0].numpy(), found[0].numpy()

    def narrow(self, streams: Any) -> Any:
        """[.., streams] -> [.., hidden]."""
        return streams @ self.weights["fc.weight"].T

    def forward(self, embedded: Any, x: Any) -> tuple[Any, Any]:
        """Sequences of one length, both [B, T, hidden], x narrow.  Logits [B, T, draft vocabulary], own states."""
        torch, w = self._torch, self.weights
        both = (self._norm(embedded, "midlayer.input_layernorm"), self._norm(x, "midlayer.hidden_norm"))
        x = x + self._attend(torch.cat(both, -1))
        h = self._norm(x, "midlayer.post_attention_layernorm")
        gate, up = (h @ w[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
        return self._norm(x, "norm") @ w["lm_head.weight"].T, x

    def _norm(self, x: Any, name: str) -> Any:
        scale = self._torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.weights[name + ".weight"]

    def _attend(self, h: Any) -> Any:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        torch, (count, length, _), width = self._torch, h.shape, self.config.head_dim
        q, k, v = (
            (h @ self.weights[f"midlayer.self_attn.{name}_proj.weight"].T).reshape(count, length, -1, width)
            for name in "qkv"
        )
        angles = self.rotation(q, torch.arange(length)[None])
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *angles)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v.transpose(1, 2)))
        later = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(later, float("-inf"))
        seen = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(count, length, -1)
        return seen @ self.weights["midlayer.self_attn.o_proj.weight"].T


build = Eagle3Reference  # as kinds of draft are compared

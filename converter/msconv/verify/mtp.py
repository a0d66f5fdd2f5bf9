"""The reference of a layer that guesses further tokens.

transformers has DeepSeek-V3's decoder layer and no module for multi-token prediction: what is around the layer is
written here from the published mathematics (arXiv:2412.19437, section 2.2, and the inference code beside the
published weights): x = eh_proj([enorm(embed(t)); hnorm(h)]) for the hidden states h of a position and the token t
that follows it; one decoder layer; shared_head.norm; the model's head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .drafting import DraftTrace
from .reference import Reference


class MtpReference:
    """The layer after the last of a reference's checkpoint, in float32, over its embedding and head."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.torch = reference, reference.torch
        model = reference.model
        self.index = model.config.num_hidden_layers
        self.prefix = f"model.layers.{self.index}."
        self.eps = model.model.norm.variance_epsilon
        self.layer = model.model.layers[self.index]

    def run(self, tokens: list[list[int]], hidden: list[NDArray[np.float32]]) -> list[DraftTrace]:
        """Each sequence by itself.  `hidden[i][j]`: of the position before that of `tokens[i][j]`."""
        torch, model = self.torch, self.reference.model
        longest = max(map(len, tokens))
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in tokens])
        before = torch.zeros(*ids.shape, hidden[0].shape[1])
        for row, given in zip(before, hidden, strict=True):
            row[: len(given)] = torch.from_numpy(given.copy())
        routed: list[Any] = []
        hook = self.layer.mlp.gate.register_forward_hook(
            lambda module, _inputs, out: routed.append(self.reference.closeness(module, out[0]))
        )
        places = torch.arange(longest)[None]
        later = torch.full((longest, longest), float("-inf")).triu(1)[None, None]
        try:
            with torch.no_grad():
                x = self._entering(model.model.embed_tokens(ids), before)
                angles = model.model.rotary_emb(x, places)
                x = self.layer(x, attention_mask=later, position_ids=places, position_embeddings=angles)
                out = self._norm(x, "shared_head.norm")
        finally:
            hook.remove()
        closest = routed[0].reshape(ids.shape)
        return [
            DraftTrace(
                self.reference.logits(out[i, : len(t)]), out[i, : len(t)].numpy(), closest[i, : len(t)].numpy()
            )
            for i, t in enumerate(tokens)
        ]

    def _entering(self, embedded: Any, before: Any) -> Any:
        """What the layer takes: the token's embedding first, then the hidden states, each behind its own norm."""
        both = self.torch.cat([self._norm(embedded, "enorm"), self._norm(before, "hnorm")], -1)
        return both @ self.reference.weights.get(self.prefix + "eh_proj.weight").T

    def _norm(self, x: Any, name: str) -> Any:
        scale = self.torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * self.reference.weights.get(f"{self.prefix}{name}.weight")


build = MtpReference  # as kinds of draft are compared

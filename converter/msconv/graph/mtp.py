"""What guesses further tokens: one layer over a token's embedding and the hidden states of the token before it.

DeepSeek-V3's multi-token prediction (arXiv:2412.19437, section 2.2): with h the last norm's output at position i
and t the token at position i + 1, the layer runs on eh_proj([enorm(embed(t)); hnorm(h)]); its own norm and the
model's head make of that the scores of the token at position i + 2.  Embedding and head are the model's, by name.
"""

from __future__ import annotations

from typing import Any

from mindspore import nn
from mindspore import ops as functional

from msconv_runtime.artifact import GraphOutput

from .decoder import Hidden, Layer, Logits, norm
from .operations import Operations
from .spec import Local


class NextToken(nn.Cell):
    """Tokens and hidden states to logits [B, V] of each sequence's last token, and hidden states [T, hidden] of
    all, which this layer takes again.  Inputs: `ops.inputs`, the hidden states, the layer's caches."""

    def __init__(self, ops: Operations, local: Local) -> None:
        super().__init__()
        c = local.config
        index = c.layers
        prefix = f"model.layers.{index}."
        self.takes = c.hidden
        self.num_inputs = len(ops.inputs())
        self.caches = [ops.caches(local.attention(index))]
        self.begin = ops.begin()
        self.embed = ops.embed("model.embed_tokens.weight")
        self.enorm = norm(ops, prefix + "enorm.weight", c.hidden, c.eps)
        self.hnorm = norm(ops, prefix + "hnorm.weight", c.hidden, c.eps)
        self.eh_proj = ops.linear(prefix + "eh_proj", c.hidden, 2 * c.hidden, False)
        self.first_norm = norm(ops, prefix + "input_layernorm.weight", c.hidden, c.eps)
        self.layer = Layer(ops, local, index, prefix + "shared_head.norm")
        self.last = ops.last_tokens()
        self.logits = Logits(ops, local, self.embed.weight)
        self.hidden = Hidden(ops, local, self.embed.weight)

    @property
    def outputs(self) -> list[GraphOutput]:
        """What a call returns, in order."""
        return [self.logits.output, self.hidden.output]

    def construct(self, *inputs: Any) -> Any:
        step = self.begin(inputs)
        embedded, before = self.enorm(self.embed(inputs[0])), self.hnorm(inputs[self.num_inputs])
        x = self.eh_proj(functional.concat((embedded, before), -1))
        found = self.layer(self.first_norm(x), x, step, inputs[self.num_inputs + 1 :])
        h = found[0]
        return self.logits(self.last(h, step)), self.hidden(h)


def build(ops: Operations, local: Local) -> NextToken:
    """The network of a draft's roles.  `takes`: the width of its hidden states."""
    return NextToken(ops, local)

"""A draft of EAGLE3: a token and the hidden states before it -> scores of the next one, and states of its own.

Legend: decoder.py.  The first step after the target's reads the target's residual streams [T, n*hidden]; further
steps read what the step before gave [T, hidden].
"""

from __future__ import annotations

from typing import Any

from mindspore import nn
from mindspore import ops as functional

from msconv_runtime.artifact import OF_TARGET, GraphOutput
from msconv_runtime.roles import HIDDEN, LOGITS

from ..families.config import DraftFor
from ..families.eagle3 import LAYER
from .decoder import HeadsAttention, add_norm, mlp, norm
from .operations import Embed, Operations
from .parameters import parameter
from .spec import Local


def hidden_width(local: Local) -> int:
    """Of the hidden states that a graph takes.  Where one graph runs both first and further steps, streams and own
    states stand side by side, and those that are not there are zeros."""
    captured, hidden = target_of(local).captured, local.config.hidden
    if local.variant or not (local.role.begins or local.target.prefill_reads_cache):
        return (captured + 1) * hidden
    return captured * hidden if local.role.begins else hidden


def target_of(local: Local) -> DraftFor:
    assert local.config.drafts_for is not None
    return local.config.drafts_for


class Streams(nn.Cell):
    """Hidden states as they are taken -> [T, hidden].  The streams are brought to that width by a matrix."""

    def __init__(self, ops: Operations, local: Local) -> None:
        super().__init__()
        hidden, streams = local.config.hidden, target_of(local).captured * local.config.hidden
        width = hidden_width(local)
        self.has_streams, self.has_both = width >= streams, width > streams
        self.parts = [streams, hidden]
        if self.has_streams:
            self.fc = ops.linear("fc", hidden, streams, False)

    def construct(self, given: Any) -> Any:
        if self.has_both:
            streams, own = functional.split(given, self.parts, -1)
            return self.fc(streams) + own
        return self.fc(given) if self.has_streams else given


class Eagle3(nn.Cell):
    """Inputs: `ops.inputs`, hidden states, the caches of one layer.  Gives logits over the draft's own tokens, of
    each sequence's last one, and hidden states before the last norm, of all tokens."""

    def __init__(self, ops: Operations, local: Local) -> None:
        super().__init__()
        c, spec = local.config, local.attention(0)
        self.at = len(ops.inputs())
        self.takes = hidden_width(local)
        self.caches = [ops.caches(spec)]
        self.begin = ops.begin()
        self.embed = target_embedding(ops, local)
        self.streams = Streams(ops, local)
        self.input_norm = norm(ops, LAYER + "input_layernorm.weight", c.hidden, c.eps)
        self.hidden_norm = norm(ops, LAYER + "hidden_norm.weight", c.hidden, c.eps)
        self.attention = HeadsAttention(ops, local, LAYER + "self_attn.", spec, inner=2 * c.hidden)
        self.after_attention = add_norm(ops, LAYER + "post_attention_layernorm.weight", c.hidden)
        self.mlp = mlp(ops, c.hidden, local.ffn, LAYER + "mlp.")
        self.reduce = ops.all_reduce("", c.hidden)
        self.after_mlp = add_norm(ops, "norm.weight", c.hidden)
        self.last = ops.last_tokens()
        self.head = ops.head(None)
        self.outputs = [
            GraphOutput(LOGITS, "float32", [None, c.vocab]),
            GraphOutput(HIDDEN, local.target.dtype, [None, c.hidden]),
        ]

    def construct(self, *inputs: Any) -> Any:
        step = self.begin(inputs)
        x = self.streams(inputs[self.at])
        h = functional.concat((self.input_norm(self.embed(inputs[0])), self.hidden_norm(x)), -1)
        h, x = self.after_attention(self.attention(h, step, inputs[self.at + 1 :]), x)
        h, x = self.after_mlp(self.reduce(self.mlp(h)), x)
        return self.head(self.last(h, step)), x


def target_embedding(ops: Operations, local: Local) -> nn.Cell:
    """ids [T] -> [T, hidden] of the table that the target has."""
    rows = -(-target_of(local).vocab // local.mesh.tp)
    weight = parameter(OF_TARGET + "model.embed_tokens.weight", (rows, local.config.hidden), ops.dtype)
    return Embed(local, weight, ops.rows(), ops.dtype, start=OF_TARGET + "vocab_start")


def build(ops: Operations, local: Local) -> Eagle3:
    return Eagle3(ops, local)

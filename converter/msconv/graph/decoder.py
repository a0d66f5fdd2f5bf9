"""A decoder-only model with grouped-query attention, written once.  It does not ask for its target.

Shape legend: T tokens of all sequences, B sequences, P table width, H heads, K kv heads, D head_dim,
V vocabulary; all per rank except V.
"""

from __future__ import annotations

from typing import Any

from mindspore import nn

from .ops.base import Ops
from .spec import Local


class Attention(nn.Cell):
    """Fused qkv, a norm per head, rotation, cache write, attention, output projection."""

    def __init__(self, ops: Ops, local: Local, prefix: str) -> None:
        super().__init__()
        c = local.config
        q, kv = local.heads * c.head_dim, local.kv_heads * c.head_dim
        bias = c.attention_bias
        self.qkv_proj = ops.linear(prefix + "qkv_proj", q + 2 * kv, c.hidden, bias)
        self.heads = ops.split_heads(prefix)
        self.write = ops.write_kv()
        self.attend = ops.attend()
        self.o_proj = ops.linear(prefix + "o_proj", c.hidden, q, False)
        self.reduce = ops.all_reduce(prefix + "o_proj.bias" if bias else "", c.hidden)

    def construct(self, h: Any, step: Any, k_cache: Any, v_cache: Any) -> Any:
        q, k, v = self.heads(self.qkv_proj(h), step)
        k_cache, v_cache = self.write(k, v, k_cache, v_cache, step)
        return self.reduce(self.o_proj(self.attend(q, k, v, k_cache, v_cache, step)))


class DenseMlp(nn.Cell):
    """down(silu(gate(h)) * up(h)), gate and up fused."""

    def __init__(self, ops: Ops, local: Local, prefix: str) -> None:
        super().__init__()
        hidden = local.config.hidden
        self.gate_up_proj = ops.linear(prefix + "gate_up_proj", 2 * local.ffn, hidden, False)
        self.act = ops.swiglu(local.ffn)
        self.down_proj = ops.linear(prefix + "down_proj", hidden, local.ffn, False)
        self.reduce = ops.all_reduce("", hidden)

    def construct(self, h: Any) -> Any:
        return self.reduce(self.down_proj(self.act(self.gate_up_proj(h))))


class Layer(nn.Cell):
    """Attention and MLP.  Takes and gives (normed input, residual): each norm is fused with its addition."""

    def __init__(self, ops: Ops, local: Local, index: int) -> None:
        super().__init__()
        c = local.config
        prefix = f"model.layers.{index}."
        follower = f"model.layers.{index + 1}.input_layernorm" if index + 1 < c.layers else "model.norm"
        self.attention = Attention(ops, local, prefix + "self_attn.")
        self.after_attention = ops.add_norm(prefix + "post_attention_layernorm.weight", c.hidden)
        self.mlp = DenseMlp(ops, local, prefix + "mlp.")
        self.after_mlp = ops.add_norm(follower + ".weight", c.hidden)

    def construct(self, h: Any, x: Any, step: Any, k_cache: Any, v_cache: Any) -> Any:
        h, x = self.after_attention(self.attention(h, step, k_cache, v_cache), x)
        return self.after_mlp(self.mlp(h), x)


class Decoder(nn.Cell):
    """Tokens to logits of each sequence's last token, [B, V].  Inputs: `ops.inputs`, then caches k0 v0 k1 v1."""

    def __init__(self, ops: Ops, local: Local) -> None:
        super().__init__()
        c = local.config
        self.num_inputs = len(ops.inputs())
        self.num_layers = c.layers
        self.begin = ops.begin()
        self.embed = ops.embed("model.embed_tokens.weight")
        self.first_norm = ops.norm("model.layers.0.input_layernorm.weight", c.hidden)
        self.layers = nn.CellList([Layer(ops, local, i) for i in range(c.layers)])
        self.last = ops.last_tokens()
        self.head = ops.head(self.embed.weight if c.tied else None)

    def construct(self, *inputs: Any) -> Any:
        step = self.begin(inputs)
        x = self.embed(inputs[0])
        h = self.first_norm(x)
        for i in range(self.num_layers):
            k_cache = inputs[self.num_inputs + 2 * i]
            v_cache = inputs[self.num_inputs + 2 * i + 1]
            h, x = self.layers[i](h, x, step, k_cache, v_cache)
        return self.head(self.last(h, step))

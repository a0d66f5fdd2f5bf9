"""A decoder-only model, written once.  It does not ask for its target; what it returns, its role says.

Shape legend: T tokens of all sequences, B sequences, P table width, H heads, K kv heads, D head_dim, R latent
width, E experts, k experts a token, V vocabulary; all per rank except V and k.
"""

from __future__ import annotations

from typing import Any

from mindspore import nn
from mindspore import ops as functional

from msconv_runtime.artifact import GraphOutput
from msconv_runtime.roles import HIDDEN, LOGITS

from ..families.attention import Attention
from .operations import Operations
from .spec import CannotCompute, Local

LATENT_EPS = 1e-6  # of the norms inside latent attention: the published code takes it from nowhere


def norm(ops: Operations, name: str, width: int, eps: float) -> nn.Cell:
    return ops.shifted(ops.norm(name, width, eps), name, width)


def add_norm(ops: Operations, name: str, width: int) -> nn.Cell:
    return ops.shifted(ops.add_norm(name, width), name, width)


class ProjectedHeads(nn.Cell):
    """Fused qkv, heads split and rotated."""

    def __init__(self, ops: Operations, hidden: int, prefix: str, spec: Attention) -> None:
        super().__init__()
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.qkv_proj = ops.linear(prefix + "qkv_proj", width, hidden, spec.bias)
        self.heads = ops.split_heads(prefix, spec)

    def construct(self, h: Any, step: Any) -> Any:
        return self.heads(self.qkv_proj(h), step)


class HeadsAttention(nn.Cell):
    """Heads, cache write, attention, output projection.  `inner`: the width of what goes in, 0 for that of what
    comes out."""

    def __init__(self, ops: Operations, local: Local, prefix: str, spec: Attention, inner: int = 0) -> None:
        super().__init__()
        hidden = local.config.hidden
        self.reduce = ops.all_reduce(prefix + "o_proj.bias" if spec.output_bias else "", hidden)
        whole = ops.whole_attention(prefix, inner or hidden, spec)
        self.has_parts = whole is None
        if whole is not None:
            self.whole = whole
            return
        self.heads = ProjectedHeads(ops, inner or hidden, prefix, spec)
        self.write = ops.write_kv()
        self.attend = ops.attend(spec)
        self.o_proj = ops.linear(prefix + "o_proj", hidden, spec.heads * spec.head_dim, False)

    def construct(self, h: Any, step: Any, caches: Any) -> Any:
        if not self.has_parts:
            return self.reduce(self.whole(h, step, caches))
        q, k, v = self.heads(h, step)
        k_cache, v_cache = self.write(k, v, caches[0], caches[1], step)
        return self.reduce(self.o_proj(self.attend(q, k, v, k_cache, v_cache, step)))


class LatentAttention(nn.Cell):
    """Keys and values of all heads come from one latent vector a token: the cache keeps that, and one rotated key
    that the heads share."""

    def __init__(self, ops: Operations, local: Local, prefix: str, spec: Attention) -> None:
        super().__init__()
        c, mla = local.config, local.mla
        q = spec.heads * spec.head_dim
        self.has_q_lora = mla.q_lora > 0
        if self.has_q_lora:
            self.q_a_proj = ops.linear(prefix + "q_a_proj", mla.q_lora, c.hidden, False)
            self.q_a_norm = norm(ops, prefix + "q_a_layernorm.weight", mla.q_lora, LATENT_EPS)
            self.q_proj = ops.linear(prefix + "q_b_proj", q, mla.q_lora, False)
        else:
            self.q_proj = ops.linear(prefix + "q_proj", q, c.hidden, False)
        self.kv_a_proj = ops.linear(prefix + "kv_a_proj_with_mqa", mla.latent, c.hidden, False)
        self.kv_a_norm = norm(ops, prefix + "kv_a_layernorm.weight", mla.kv_lora, LATENT_EPS)
        self.rotate = ops.rotate_latent()
        self.write = ops.write_latent()
        self.attend = ops.attend_latent(prefix, spec)
        self.o_proj = ops.linear(prefix + "o_proj", c.hidden, spec.heads * mla.v_dim, False)
        self.reduce = ops.all_reduce("", c.hidden)

    def construct(self, h: Any, step: Any, caches: Any) -> Any:
        q = self.q_a_norm(self.q_a_proj(h)) if self.has_q_lora else h
        q_nope, q_rope, latent, k_rope = self.rotate(self.q_proj(q), self.kv_a_proj(h), step)
        latent = self.kv_a_norm(latent)
        cache = self.write(latent, k_rope, caches[0], step)
        return self.reduce(self.o_proj(self.attend(q_nope, q_rope, latent, k_rope, cache, step)))


class Mlp(nn.Cell):
    """down(silu(gate(h)) * up(h)), gate and up fused.  This rank's share of the sum over ranks."""

    def __init__(self, ops: Operations, hidden: int, ffn: int, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = ops.linear(prefix + "gate_up_proj", 2 * ffn, hidden, False)
        self.act = ops.swiglu(ffn)
        self.down_proj = ops.linear(prefix + "down_proj", hidden, ffn, False)

    def construct(self, h: Any) -> Any:
        return self.down_proj(self.act(self.gate_up_proj(h)))


def mlp(ops: Operations, hidden: int, ffn: int, prefix: str) -> nn.Cell:
    return ops.whole_mlp(prefix, hidden, ffn) or Mlp(ops, hidden, ffn, prefix)


class DenseMlp(nn.Cell):
    def __init__(self, ops: Operations, local: Local, prefix: str) -> None:
        super().__init__()
        self.mlp = mlp(ops, local.config.hidden, local.ffn, prefix)
        self.reduce = ops.all_reduce("", local.config.hidden)

    def construct(self, h: Any) -> Any:
        return self.reduce(self.mlp(h))


class MoeMlp(nn.Cell):
    """Each rank has all tokens and some experts, or some of each; one sum over ranks brings them together.  (An
    exchange of tokens between ranks would be another `ops.experts`.)"""

    def __init__(self, ops: Operations, local: Local, prefix: str) -> None:
        super().__init__()
        self.route = ops.route(prefix + "gate")
        self.experts = ops.experts(prefix + "experts.")
        self.has_shared = local.moe.shared_ffn > 0
        if self.has_shared:
            self.shared = mlp(ops, local.config.hidden, local.shared_ffn, prefix + "shared_experts.")
        self.reduce = ops.all_reduce("", local.config.hidden)

    def construct(self, h: Any) -> Any:
        weights, ids = self.route(h)
        y = self.experts(h, weights, ids)
        if self.has_shared:
            y = y + self.shared(h)
        return self.reduce(y)


class Layer(nn.Cell):
    """Attention and MLP.  Takes and gives (normed input, residual): each norm is fused with its addition.
    `follower`: the norm after it."""

    def __init__(self, ops: Operations, local: Local, index: int, follower: str) -> None:
        super().__init__()
        c = local.config
        prefix = f"model.layers.{index}."
        spec = local.attention(index)
        whole = ops.whole_layer(index, follower + ".weight") if spec.kind == "heads" else None
        self.is_whole = whole is not None
        if whole is not None:
            self.whole = whole
            return
        if spec.kind == "heads":
            self.attention = HeadsAttention(ops, local, prefix + "self_attn.", spec)
        else:
            self.attention = LatentAttention(ops, local, prefix + "self_attn.", spec)
        self.after_attention = add_norm(ops, prefix + "post_attention_layernorm.weight", c.hidden)
        self.mlp = (MoeMlp if c.has_experts(index) else DenseMlp)(ops, local, prefix + "mlp.")
        self.after_mlp = add_norm(ops, follower + ".weight", c.hidden)

    def construct(self, h: Any, x: Any, step: Any, caches: Any) -> Any:
        if self.is_whole:
            return self.whole(h, x, step, caches)
        h, x = self.after_attention(self.attention(h, step, caches), x)
        return self.after_mlp(self.mlp(h), x)


class Logits(nn.Cell):
    """The vocabulary's scores, [.., hidden] -> [.., V]."""

    def __init__(self, ops: Operations, local: Local, embedding: Any) -> None:
        super().__init__()
        self.head = ops.head(embedding if local.config.tied else None)
        self.output = GraphOutput(LOGITS, "float32", [None, local.config.vocab])

    def construct(self, h: Any) -> Any:
        return self.head(h)


class Hidden(nn.Cell):
    """What the head would read, the last norm's output; or, side by side, the residual streams that enter the
    layers that a draft asks for."""

    def __init__(self, ops: Operations, local: Local, embedding: Any) -> None:
        super().__init__()
        streams = len(local.draft.layers) if local.draft else 0
        self.output = GraphOutput(HIDDEN, local.target.dtype, [None, max(1, streams) * local.config.hidden])

    def construct(self, h: Any) -> Any:
        return h


OUTPUTS = {LOGITS: Logits, HIDDEN: Hidden}


class Decoder(nn.Cell):
    """Tokens to the role's outputs, of each sequence's last token [B, ..] or of all tokens [T, ..].  Inputs:
    `ops.inputs`, then each layer's caches."""

    def __init__(self, ops: Operations, local: Local) -> None:
        super().__init__()
        c = local.config
        self.num_inputs = len(ops.inputs())
        self.num_layers = c.layers
        self.caches = [ops.caches(local.attention(i)) for i in range(c.layers)]
        self.num_caches = len(self.caches[0])
        self.begin = ops.begin()
        self.embed = ops.embed("model.embed_tokens.weight")
        self.first_norm = norm(ops, "model.layers.0.input_layernorm.weight", c.hidden, c.eps)
        followers = [*(f"model.layers.{i}.input_layernorm" for i in range(1, c.layers)), "model.norm"]
        self.layers = nn.CellList([Layer(ops, local, i, follower) for i, follower in enumerate(followers)])
        self.has_all_rows = local.role.rows == "all"
        self.last = ops.last_tokens()
        self.results = nn.CellList([OUTPUTS[name](ops, local, self.embed.weight) for name in local.outputs])

    @property
    def outputs(self) -> list[GraphOutput]:
        """What a call returns, in order."""
        return [result.output for result in self.results]

    def construct(self, *inputs: Any) -> Any:
        step = self.begin(inputs)
        x = self.embed(inputs[0])
        h = self.first_norm(x)
        for i in range(self.num_layers):
            first = self.num_inputs + self.num_caches * i
            h, x = self.layers[i](h, x, step, inputs[first : first + self.num_caches])
        if not self.has_all_rows:
            h = self.last(h, step)
        found: Any = ()
        for result in self.results:
            found = (*found, result(h))
        return found[0] if len(found) == 1 else found


class DecoderWithDraft(Decoder):
    """The same with hidden states of all tokens beside the logits, for what guesses further ones."""

    def __init__(self, ops: Operations, local: Local) -> None:
        super().__init__(ops, local)
        layers = local.draft.layers if local.draft else []
        self.is_captured = [i in layers for i in range(local.config.layers)]
        self.num_captured = sum(self.is_captured)
        if self.num_captured < len(layers):
            raise CannotCompute(f"{local.title}: a draft reads layers {layers} of {local.config.layers}.")

    def construct(self, *inputs: Any) -> Any:
        step = self.begin(inputs)
        x = self.embed(inputs[0])
        h = self.first_norm(x)
        streams: Any = ()
        for i in range(self.num_layers):
            if self.is_captured[i]:
                streams = (*streams, x)
            first = self.num_inputs + self.num_caches * i
            h, x = self.layers[i](h, x, step, inputs[first : first + self.num_caches])
        hidden = h
        if self.num_captured == 1:
            hidden = streams[0]
        if self.num_captured > 1:
            hidden = functional.concat(streams, -1)
        if not self.has_all_rows:
            h = self.last(h, step)
        return self.results[0](h), self.results[1](hidden)


def build(ops: Operations, local: Local) -> Decoder:
    """The network of a role whose record names this module.  It has `outputs`, and `caches`, a list for each layer
    that it runs, the first layer's first."""
    return Decoder(ops, local) if local.outputs == local.role.outputs else DecoderWithDraft(ops, local)

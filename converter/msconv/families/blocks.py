"""Groups of rules that families are made of, and the names under which checkpoints have them."""

from __future__ import annotations

from ..layout.cuts import COLS, COPY, EXPERT_COLS, EXPERT_ROWS, HEAD_COLS, HEADS, KV_HEADS, ROWS, VOCAB, Cut
from ..layout.rules import OWN, Drop, Part, Rule, fuse, keep, maybe, stack

LAYER = "model.layers.{layer}."
ATTN, MLP = LAYER + "self_attn.", LAYER + "mlp."


def qkv(kind: str, *inner: str, when: str = "", prefix: str = ATTN) -> Rule:
    """Queries, keys and values of all heads, matrices or biases, as one.  `inner`: the size of the input."""
    return fuse(
        f"{prefix}qkv_proj.{kind}",
        Part(f"{prefix}q_proj.{kind}", ("q", *inner), HEADS),
        Part(f"{prefix}k_proj.{kind}", ("kv", *inner), KV_HEADS),
        Part(f"{prefix}v_proj.{kind}", ("kv", *inner), KV_HEADS),
        when=when,
    )


def norm(name: str, width: str) -> tuple[Rule, Rule]:
    """A norm's weight, and the bias that tools which shift outliers give it: y = norm(x) * weight + bias."""
    return keep(name + ".weight", (width,), COPY), maybe(name + ".bias", (width,), COPY)


def gate_up_parts(prefix: str, ffn: str, cut: Cut) -> tuple[Part, Part]:
    """Both matrices into a gated MLP, [ffn, hidden] each."""
    return (
        Part(prefix + "gate_proj.weight", (ffn, "hidden"), cut),
        Part(prefix + "up_proj.weight", (ffn, "hidden"), cut),
    )


def gate_up(prefix: str, ffn: str) -> Rule:
    """Both matrices into a gated MLP as one."""
    return fuse(prefix + "gate_up_proj.weight", *gate_up_parts(prefix, ffn, ROWS))


def gated_mlp(prefix: str, ffn: str) -> tuple[Rule, Rule]:
    """down(silu(gate) * up)."""
    return gate_up(prefix, ffn), keep(prefix + "down_proj.weight", ("hidden", ffn), COLS)


ATTENTION = (
    *norm(LAYER + "input_layernorm", "hidden"),
    qkv("weight", "hidden"),
    qkv("bias", when="attention_bias"),
    keep(ATTN + "q_norm.weight", ("head_dim",), COPY),
    keep(ATTN + "k_norm.weight", ("head_dim",), COPY),
    keep(ATTN + "o_proj.weight", ("hidden", "q"), HEAD_COLS),
    keep(ATTN + "o_proj.bias", ("hidden",), COPY, when="attention_bias"),  # added after the all-reduce
    *norm(LAYER + "post_attention_layernorm", "hidden"),
)

DENSE_MLP = gated_mlp(MLP, "ffn")

EXPERTS = (
    keep(MLP + "gate.weight", ("experts", "hidden"), COPY, dtype=OWN),
    stack(
        MLP + "experts.gate_up_proj.weight", *gate_up_parts(MLP + "experts.{expert}.", "expert_ffn", EXPERT_ROWS)
    ),
    stack(
        MLP + "experts.down_proj.weight",
        Part(MLP + "experts.{expert}.down_proj.weight", ("hidden", "expert_ffn"), EXPERT_COLS),
    ),
)

ROUTER_BIAS = (keep(MLP + "gate.e_score_correction_bias", ("experts",), COPY, dtype="float32"),)

SHARED_EXPERT = gated_mlp(MLP + "shared_experts.", "shared_ffn")

EMBEDDING = (keep("model.embed_tokens.weight", ("vocab", "hidden"), VOCAB, as_values=True),)

HEAD = (
    keep("model.norm.weight", ("hidden",), COPY),
    keep("lm_head.weight", ("vocab", "hidden"), VOCAB, when="untied", as_values=True),
)

DROPS = (
    Drop("lm_head.weight", "tied to model.embed_tokens.weight", "tied", twin="model.embed_tokens.weight"),
    Drop("model.layers.*.self_attn.rotary_emb.inv_freq", "rotary buffer, computed from the configuration"),
    Drop("model.rotary_emb.inv_freq", "rotary buffer, computed from the configuration"),
)

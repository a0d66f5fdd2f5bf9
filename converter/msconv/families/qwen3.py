"""Qwen3 dense, 0.6B to 32B: grouped-query attention with a norm per head on q and k, SwiGLU."""

from __future__ import annotations

from ..layout.cuts import COLS, COPY, HEAD_COLS, HEADS, KV_HEADS, ROWS, VOCAB
from ..layout.model import Table
from ..layout.rules import Drop, Part, fuse, keep
from .config import Family

L = "model.layers.{layer}."
A, M = L + "self_attn.", L + "mlp."

ATTENTION = (
    keep(L + "input_layernorm.weight", ("hidden",), COPY),
    fuse(
        A + "qkv_proj.weight",
        Part(A + "q_proj.weight", ("q", "hidden"), HEADS),
        Part(A + "k_proj.weight", ("kv", "hidden"), KV_HEADS),
        Part(A + "v_proj.weight", ("kv", "hidden"), KV_HEADS),
    ),
    fuse(
        A + "qkv_proj.bias",
        Part(A + "q_proj.bias", ("q",), HEADS),
        Part(A + "k_proj.bias", ("kv",), KV_HEADS),
        Part(A + "v_proj.bias", ("kv",), KV_HEADS),
        when="attention_bias",
    ),
    keep(A + "q_norm.weight", ("head_dim",), COPY),
    keep(A + "k_norm.weight", ("head_dim",), COPY),
    keep(A + "o_proj.weight", ("hidden", "q"), HEAD_COLS),
    keep(A + "o_proj.bias", ("hidden",), COPY, when="attention_bias"),  # added after the all-reduce
    keep(L + "post_attention_layernorm.weight", ("hidden",), COPY),
)

DENSE_MLP = (
    fuse(
        M + "gate_up_proj.weight",
        Part(M + "gate_proj.weight", ("ffn", "hidden"), ROWS),
        Part(M + "up_proj.weight", ("ffn", "hidden"), ROWS),
    ),
    keep(M + "down_proj.weight", ("hidden", "ffn"), COLS),
)

EMBEDDING = (keep("model.embed_tokens.weight", ("vocab", "hidden"), VOCAB),)

HEAD = (
    keep("model.norm.weight", ("hidden",), COPY),
    keep("lm_head.weight", ("vocab", "hidden"), VOCAB, when="untied"),
)

DROPS = (
    Drop("lm_head.weight", "tied to model.embed_tokens.weight", "tied", twin="model.embed_tokens.weight"),
    Drop("model.layers.*.self_attn.rotary_emb.inv_freq", "rotary buffer, computed from the configuration"),
    Drop("model.rotary_emb.inv_freq", "rotary buffer, computed from the configuration"),
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=Table((*EMBEDDING, *ATTENTION, *DENSE_MLP, *HEAD), DROPS),
    windows_by_layer=True,
)

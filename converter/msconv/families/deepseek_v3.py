"""DeepSeek-V3 and R1: latent attention, first layers dense, then sigmoid routing in groups and a shared expert."""

from __future__ import annotations

from typing import Any

from msconv_runtime.draft_kinds.mtp import MTP

from ..layout.cuts import COPY, HEAD_COLS, Cut
from ..layout.model import Table
from ..layout.rules import Drop, keep, only, plain, take
from .blocks import ATTN, DENSE_MLP, DROPS, EMBEDDING, EXPERTS, HEAD, LAYER, ROUTER_BIAS, SHARED_EXPERT, norm
from .config import MAX_EXPERTS, Family, Mla, Moe, Reader
from .keys import COMMON

LATENT = Cut("latent", head="latent", pairs="pairs")  # the rotated rows at its end in halves
QUERY_HEADS = Cut("query_heads", 0, unit="heads", head="head_dim", pairs="pairs")
KEY_HEADS = Cut("key_heads", 0, unit="heads", head="kv_b_head", rows="nope")
VALUE_HEADS = Cut("value_heads", 0, unit="heads", head="kv_b_head", first="nope", rows="v_dim")

LATENT_ATTENTION = (
    *norm(LAYER + "input_layernorm", "hidden"),
    keep(ATTN + "q_a_proj.weight", ("q_lora", "hidden"), COPY, when="q_lora"),
    *only("q_lora", norm(ATTN + "q_a_layernorm", "q_lora")),
    keep(ATTN + "q_b_proj.weight", ("q", "q_lora"), QUERY_HEADS, when="q_lora"),
    keep(ATTN + "q_proj.weight", ("q", "hidden"), QUERY_HEADS, when="no_q_lora"),
    keep(ATTN + "kv_a_proj_with_mqa.weight", ("latent", "hidden"), LATENT),
    *norm(ATTN + "kv_a_layernorm", "kv_lora"),
    take(ATTN + "kv_b_proj_k.weight", ATTN + "kv_b_proj.weight", ("kv_b", "kv_lora"), KEY_HEADS),
    take(ATTN + "kv_b_proj_v.weight", ATTN + "kv_b_proj.weight", ("kv_b", "kv_lora"), VALUE_HEADS),
    keep(ATTN + "o_proj.weight", ("hidden", "o"), HEAD_COLS),
    *norm(LAYER + "post_attention_layernorm", "hidden"),
)


def read(r: Reader, layers: int) -> dict[str, Any]:
    """Latent attention and routing.  What V2 and V3.2 do otherwise is said, not ignored."""
    r.needs("q_lora_rank", "first_k_dense_replace", "n_shared_experts", "n_group", "topk_group")
    r.needs("routed_scaling_factor", "norm_topk_prob")
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        r.one_of(key, value)
    if any(key in r.raw for key in ("index_topk", "index_n_heads", "index_head_dim")):
        r.problems.append(V32)
    if r.flag("attention_bias", False):
        r.problems.append("attention_bias is true: not supported with latent attention")
    if r.whole("moe_layer_freq", 1) != 1:
        r.problems.append("moe_layer_freq other than 1 is not supported")
    heads, kv_heads = r.whole("num_attention_heads"), r.count("num_key_value_heads")
    if kv_heads not in (0, heads):
        r.problems.append(
            f"num_key_value_heads {kv_heads}: latent attention has one for each of its {heads} heads"
        )
    r.same("n_routed_experts", "num_local_experts")
    r.same("num_nextn_predict_layers", "num_mtp_layers")
    mla = Mla(
        q_lora=r.count("q_lora_rank"),
        kv_lora=r.whole("kv_lora_rank"),
        nope=r.whole("qk_nope_head_dim"),
        rope=r.whole("qk_rope_head_dim"),
        v_dim=r.whole("v_head_dim"),
        interleaved=r.flag("rope_interleave", True),
    )
    if mla.rope % 2:
        r.problems.append(f"qk_rope_head_dim {mla.rope} is odd: rotary embedding needs pairs")
    _check_widths(r, mla)
    dense = r.count("first_k_dense_replace")
    ffn = r.whole("moe_intermediate_size")
    moe = Moe(
        layers=tuple(i >= dense for i in range(layers)),
        experts=r.whole("n_routed_experts", most=MAX_EXPERTS),
        top_k=r.whole("num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=ffn * r.count("n_shared_experts"),
        scoring="sigmoid",
        groups=r.whole("n_group", 1),
        top_groups=r.whole("topk_group", 1),
        normalise=r.flag("norm_topk_prob", True),
        scale=r.real("routed_scaling_factor", 1.0),
    )
    _check_groups(r, moe)
    return {
        "mla": mla,
        "moe": moe,
        "kv_heads": heads,
        "head_dim": mla.nope + mla.rope,
        "own_draft": MTP,
        "mtp_layers": r.count("num_nextn_predict_layers", r.count("num_mtp_layers", most=64), most=64),
    }


def _check_groups(r: Reader, moe: Moe) -> None:
    size = moe.experts // moe.groups
    if moe.experts % moe.groups:
        r.problems.append(f"n_routed_experts {moe.experts} is not a multiple of n_group {moe.groups}")
    elif moe.top_groups > moe.groups:
        r.problems.append(f"topk_group {moe.top_groups} is more than n_group {moe.groups}")
    elif size < 2:
        r.problems.append(f"groups of {size} expert: their score is the sum of the best two")
    elif moe.top_k > size * moe.top_groups:
        r.problems.append(f"num_experts_per_tok {moe.top_k} of {moe.top_groups} groups of {size} experts")


def _check_widths(r: Reader, mla: Mla) -> None:
    """Widths that follow from others: `head_dim` is that of rotation in what transformers saves."""
    for key, values in (
        ("qk_head_dim", (mla.nope + mla.rope,)),
        ("head_dim", (mla.rope, mla.nope + mla.rope)),
    ):
        if r.raw.get(key) is not None and r.raw[key] not in values:
            r.problems.append(f"{key} {r.raw[key]}: {' or '.join(map(str, values))} is what the other widths give")


DRAFT = (
    keep(LAYER + "enorm.weight", ("hidden",), COPY),
    keep(LAYER + "hnorm.weight", ("hidden",), COPY),
    plain(LAYER + "eh_proj.weight", ("hidden", "both_hidden"), COPY),
    keep(LAYER + "shared_head.norm.weight", ("hidden",), COPY),
)
SHARED_WITH_DRAFT = (  # published twice, used once: servers give the draft the model's own
    Drop(
        "model.layers.{draft}.embed_tokens.weight",
        "the draft's copy of model.embed_tokens.weight",
        "draft",
        twin="model.embed_tokens.weight",
    ),
    Drop(
        "model.layers.{draft}.shared_head.head.weight",
        "the draft's copy of lm_head.weight",
        "draft untied",
        twin="lm_head.weight",
    ),
    Drop(
        "model.layers.{draft}.shared_head.head.weight",
        "the draft's copy of model.embed_tokens.weight",
        "draft tied",
        twin="model.embed_tokens.weight",
    ),
)

V32 = "index_topk, index_n_heads, index_head_dim: the sparse attention of DeepSeek-V3.2 is not supported"

KEYS = COMMON.plus(
    """q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim rope_interleave
    first_k_dense_replace moe_layer_freq n_routed_experts num_local_experts n_shared_experts num_experts_per_tok
    moe_intermediate_size n_group topk_group topk_method scoring_func norm_topk_prob routed_scaling_factor
    num_nextn_predict_layers num_mtp_layers index_topk index_n_heads index_head_dim"""
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    table=Table(
        (
            *EMBEDDING,
            *LATENT_ATTENTION,
            *only("dense_layer", DENSE_MLP),
            *only("moe_layer", (*EXPERTS, *ROUTER_BIAS)),
            *only("shared_expert", SHARED_EXPERT),
            *only("draft_layer", DRAFT),
            *HEAD,
        ),
        (
            *DROPS,
            *SHARED_WITH_DRAFT,
            Drop("model.layers.{mtp}.*", "multi-token prediction layer, not part of the decoder", "mtp"),
        ),
    ),
    read=read,
    keys=KEYS,
    aliases=("kimi_k2",),
)

"""Qwen3-MoE, 30B-A3B and 235B-A22B: Qwen3's attention, softmax routing, no shared expert."""

from __future__ import annotations

from typing import Any

from ..layout.model import Table
from ..layout.rules import only
from .blocks import ATTENTION, DENSE_MLP, DROPS, EMBEDDING, EXPERTS, HEAD
from .config import MAX_EXPERTS, Family, Moe, Reader
from .keys import COMMON


def read(r: Reader, layers: int) -> dict[str, Any]:
    """Which layers have experts (`mlp_only_layers`, `decoder_sparse_step`), and how tokens are routed."""
    spelled = "num_experts" if "num_experts" in r.raw else "num_local_experts"  # published, transformers 5
    r.same("num_experts", "num_local_experts")
    experts, top_k = r.whole(spelled, most=MAX_EXPERTS), r.whole("num_experts_per_tok")
    if top_k > experts:
        r.problems.append(f"num_experts_per_tok {top_k} is more than {spelled} {experts}")
    step = r.whole("decoder_sparse_step", 1)
    dense = r.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        r.problems.append("mlp_only_layers: a list of layer numbers is needed")
        dense = []
    moe = Moe(
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
        experts=experts,
        top_k=top_k,
        ffn=r.whole("moe_intermediate_size"),
        normalise=r.flag("norm_topk_prob", False),
    )
    return {"moe": moe}


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    table=Table(
        (*EMBEDDING, *ATTENTION, *only("dense_layer", DENSE_MLP), *only("moe_layer", EXPERTS), *HEAD), DROPS
    ),
    read=read,
    keys=COMMON.plus(
        """num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob
        decoder_sparse_step mlp_only_layers"""
    ),
)

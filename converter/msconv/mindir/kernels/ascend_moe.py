"""Ascend's primitives for mixture of experts, as sgl-mindspore and vllm-mindspore call them.

What a caller must not rely on is made unusable here: rows that no group reaches are NaN.
"""

from __future__ import annotations

from typing import Any

import torch

from .int8 import sums
from .table import Context, kernel, upcast

Attributes = dict[str, Any]
CUMULATIVE, COUNTS = 1, 2  # MoeInitRoutingV2's third output
ONE_EACH = (1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)  # group_info: tensors in each argument
ONE_EACH_WITH_SCALES = (1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0)
OF_SCALES = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float16}  # GroupedMatmulV4's result


@kernel("FusedAddTopKDiv")
def fused_add_top_k_div(c: Context, a: Attributes, logits: Any, bias: Any, *settings: Any) -> Any:
    """Sigmoid of logits [T, E]; score + bias chooses groups by the sum of their best `best`, then experts; weights
    are the scores, divided by their sum if asked, times the scale.  ([T, k] float32, [T, k] int32)."""
    groups, top_groups, best, count, activation, normalise, scale, table, numbers, mapped = settings
    if int(activation) != 0 or table is not None or numbers is not None or mapped:
        raise ValueError("FusedAddTopKDiv: only sigmoid without a mapping of experts is known here")
    scores = logits.float().sigmoid()
    choice = scores + bias.float()
    tokens, experts = choice.shape
    grouped = choice.reshape(tokens, int(groups), -1)
    sums = grouped.topk(int(best), -1)[0].sum(-1)
    kept = torch.zeros_like(sums).scatter_(1, sums.topk(int(top_groups), -1)[1], 1.0).bool()
    choice = grouped.masked_fill(~kept[:, :, None], float("-inf")).reshape(tokens, experts)
    ids = choice.topk(int(count), -1)[1]
    weights = scores.gather(1, ids)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * float(scale), ids.int()


@kernel("MoeInitRoutingV2")
def moe_init_routing(c: Context, a: Attributes, x: torch.Tensor, ids: Any, *settings: Any) -> Any:
    """Rows of x [T, H] by expert, stable: (rows [T*k, H], place of (token, choice) [T*k], tokens of each expert
    or, cumulative, where they end [E], the same)."""
    active, capacity, experts, mode, counts_flag, before = settings
    if int(active) or int(capacity) or int(mode) or not before:
        raise ValueError("MoeInitRoutingV2: dropping and padding are not known here")
    flat = ids.reshape(-1).long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= int(experts)):
        raise IndexError(f"MoeInitRoutingV2: experts {int(flat.min())}..{int(flat.max())} of {int(experts)}")
    order = torch.argsort(flat, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    counts = torch.bincount(flat, minlength=int(experts))
    if int(counts_flag) == CUMULATIVE:
        counts = counts.cumsum(0)
    elif int(counts_flag) != COUNTS:
        raise ValueError(f"MoeInitRoutingV2: flag {counts_flag} is not known here")
    return x[order // ids.shape[1]], places.int(), counts.int(), counts.int()


@kernel("GroupedMatmulV4", attributes=("group_info",))
def grouped_matmul(c: Context, a: Attributes, xs: Any, weights: Any, *rest: Any) -> Any:
    """Rows of x [N, K], group after group, times weight [E, K, M] of the group.  `group_list_type` 1: how many
    rows each group has; 0: where each ends.  Of int8: times scales [E, M] of the group and those of the rows [N],
    in the type of the scales (float16 for float32), whatever type is asked for."""
    bias, scales, offset, anti_scale, anti_offset, token_scales, groups, *nothing = rest[:-5]
    split, group_type, list_type, activation, dtype = rest[-5:]
    unknown = (bias, offset, anti_scale, anti_offset, *nothing)
    if any(v is not None for v in unknown) or (scales is None) != (token_scales is None):
        raise ValueError("GroupedMatmulV4: only x, weight, their scales and a group list are known here")
    if tuple(a["group_info"]) != (ONE_EACH if scales is None else ONE_EACH_WITH_SCALES):
        raise ValueError(f"GroupedMatmulV4: group_info {a['group_info']}")
    if int(split) != 3 or int(group_type) != 0 or int(activation) != 0 or (dtype is None) != (scales is None):
        raise ValueError(f"GroupedMatmulV4: split_item {split}, group_type {group_type}, act_type {activation}")
    (x,), (weight,) = xs, weights
    ends = groups if int(list_type) == 0 else groups.cumsum(0)
    if len(ends) != len(weight) or (len(ends) and int(ends[-1]) > len(x)):
        raise ValueError(f"GroupedMatmulV4: {len(ends)} groups for {len(weight)} experts and {len(x)} rows")
    to = x.dtype if scales is None else c.keep(OF_SCALES[scales[0].dtype])
    out = torch.full((len(x), weight.shape[2]), float("nan"), dtype=to)
    begin = 0
    for expert, end in enumerate(int(e) for e in ends):
        if end > begin and scales is None:
            out[begin:end] = (upcast(x[begin:end]) @ upcast(weight[expert])).to(to)
        elif end > begin:
            y = sums(x[begin:end], weight[expert]).float() * scales[0][expert].float()
            out[begin:end] = (y * token_scales[0][begin:end, None]).to(to)
        begin = end
    return (out,)


@kernel("InnerMoeTokenUnpermute")
def moe_token_unpermute(c: Context, a: Attributes, y: Any, places: Any, weights: Any, padded: Any, to: Any) -> Any:
    """Rows of y [T*k, H] back at their tokens, times weights [T, k], summed: [T, H]."""
    if padded or to is not None:
        raise ValueError("MoeTokenUnpermute: padding is not known here")
    tokens, count = weights.shape
    if places.numel() and (int(places.min()) < 0 or int(places.max()) >= len(y)):
        raise IndexError(f"MoeTokenUnpermute: places {int(places.min())}..{int(places.max())} of {len(y)}")
    rows = y[places.long()].reshape(tokens, count, -1)
    return (upcast(rows) * upcast(weights)[:, :, None]).sum(1).to(y.dtype)

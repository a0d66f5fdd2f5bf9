"""Mixture of experts with Ascend's grouped primitives, as sgl-mindspore and vllm-mindspore use them.

With expert parallelism every rank sorts all tokens; those of other ranks' experts go behind its own, where the
grouped products do not reach, and count for nothing in the sum.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import mint, nn, ops
from mindspore.ops import auto_generate as fused

from ..matrix import Matrix
from ..parameters import parameter
from ..spec import Local

SIGMOID = 0  # FusedAddTopKDiv's activation
BEST_OF_GROUP = 2  # a group's score is the sum of its best two
COUNTS, CUMULATIVE = 2, 1  # MoeInitRoutingV2: what it gives of each expert's tokens


class RouteSoftmax(nn.Cell):
    """The product in the model's type, softmax and the best k in float32."""

    def __init__(self, local: Local, name: str, dtype: Any) -> None:
        super().__init__()
        moe = local.moe
        self.top_k, self.normalise, self.scale, self.dtype = moe.top_k, moe.normalise, moe.scale, dtype
        self.weight = parameter(name + ".weight", (moe.experts, local.config.hidden), dtype)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, h: Any) -> Any:
        logits = ops.cast(self.matmul(h, self.weight), ms.float32)
        weights, ids = mint.topk(ops.softmax(logits, -1), self.top_k, -1)
        if self.normalise:
            weights = weights / ops.sum(weights, -1, True)
        if self.scale != 1.0:
            weights = weights * self.scale
        return ops.cast(weights, self.dtype), ops.cast(ids, ms.int32)


class RouteSigmoid(nn.Cell):
    """All in float32, as the published model does it: score + bias chooses, the score alone weighs."""

    def __init__(self, local: Local, name: str, dtype: Any) -> None:
        super().__init__()
        self.moe, self.dtype = local.moe, dtype
        experts = self.moe.experts
        self.weight = parameter(name + ".weight", (experts, local.config.hidden), ms.float32)
        self.bias = parameter(name + ".e_score_correction_bias", (experts,), ms.float32)
        self.matmul = ops.MatMul(transpose_b=True)
        self.groups, self.top_groups, self.top_k = self.moe.groups, self.moe.top_groups, self.moe.top_k
        self.normalise, self.scale = self.moe.normalise, self.moe.scale
        self.choose = fused.FusedAddTopKDiv()

    def construct(self, h: Any) -> Any:
        logits = self.matmul(ops.cast(h, ms.float32), self.weight)
        weights, ids = self.choose(
            logits,
            self.bias,
            self.groups,
            self.top_groups,
            BEST_OF_GROUP,
            self.top_k,
            SIGMOID,
            self.normalise,
            self.scale,
        )
        return ops.cast(weights, self.dtype), ops.cast(ids, ms.int32)


class GroupedProduct(nn.Cell):
    """x [N, inner], its rows sorted by expert, times each expert's matrix.  `groups` [E]: how many rows each has,
    or where they end."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.group_list_type = 0 if local.target.cumulative_counts else 1
        self.product = fused.GroupedMatmulV4()

    def construct(self, x: Any, groups: Any, weight: Any) -> Any:
        return self.product(
            [x],
            [weight],
            None,
            None,
            None,
            None,
            None,
            None,
            groups,
            split_item=3,
            group_type=0,
            group_list_type=self.group_list_type,
        )[0]


class Experts(nn.Cell):
    """Sort tokens by expert, two grouped products, unsort and sum.  `act`: [N, 2*ffn] -> [N, ffn], if that is one
    operation; row by row, so rows that no group reaches stay what they are."""

    def __init__(
        self, local: Local, matrices: tuple[Matrix, Matrix], start: Any | None, act: nn.Cell | None
    ) -> None:
        super().__init__()
        self.has_act = act is not None
        if act is not None:
            self.act = act
        self.count, self.ffn, self.all = local.experts, local.expert_ffn, local.moe.experts
        self.gate_up, self.down = matrices
        self.has_ep = start is not None
        if self.has_ep:
            self.start = start
        self.has_cumulative_counts = local.target.cumulative_counts
        self.counts = CUMULATIVE if self.has_cumulative_counts else COUNTS
        self.sort = fused.MoeInitRoutingV2()
        self.unsort = fused.MoeTokenUnpermute()

    def construct(self, h: Any, weights: Any, ids: Any) -> Any:
        if self.has_ep:
            ids = ids - self.start
            is_mine = ops.logical_and(ids >= 0, ids < self.count)
            ids = ops.select(is_mine, ids, ops.zeros_like(ids) + (self.all - 1))
            weights = weights * ops.cast(is_mine, weights.dtype)
        x, places, groups, _ = self.sort(
            h,
            ids,
            active_num=0,
            expert_capacity=0,
            expert_num=self.all,
            drop_pad_mode=0,
            expert_tokens_count_or_cumsum_flag=self.counts,
            expert_tokens_before_capacity_flag=True,
        )
        if self.has_ep:
            groups = groups[: self.count]
        groups = ops.cast(groups, ms.int64)
        if self.has_act:
            y = self.down(self.act(self.gate_up(x, groups)), groups)
        else:
            gate, up = ops.split(self.gate_up(x, groups), self.ffn, -1)
            y = self.down(ops.silu(gate) * up, groups)
        if self.has_ep:
            y = self.without_rest(y, groups)
        return self.unsort(
            permuted_tokens=y, sorted_indices=places, probs=weights, padded_mode=False, restore_shape=None
        )

    def without_rest(self, y: Any, groups: Any) -> Any:
        """Rows behind the last group hold what was in memory: whatever it is, it must not become NaN."""
        if not self.has_cumulative_counts:  # a device without counts has no NanToNum either
            return mint.nan_to_num(y, 0.0, 0.0, 0.0)
        row = ops.arange(0, ops.shape(y)[0]).reshape(-1, 1)
        return ops.select((row < groups[self.count - 1 :]).broadcast_to(y.shape), y, ops.zeros_like(y))

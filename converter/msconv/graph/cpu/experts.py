"""Mixture of experts on a CPU: routing in float32, experts gathered for decode and grouped for prefill."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ..matrix import Matrix
from ..operations import alike
from ..parameters import parameter
from ..spec import Local

LEFT_OUT = -1e30  # score of an expert whose group was not chosen


class RouteSoftmax(nn.Cell):
    """Softmax over all experts, the best k."""

    def __init__(self, local: Local, name: str) -> None:
        super().__init__()
        moe = local.moe
        self.top_k, self.normalise, self.scale = moe.top_k, moe.normalise, moe.scale
        self.weight = parameter(name + ".weight", (moe.experts, local.config.hidden), ms.float32)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, h: Any) -> Any:
        weights, ids = ops.topk(ops.softmax(self.matmul(h, self.weight), -1), self.top_k)
        if self.normalise:
            weights = weights / ops.sum(weights, -1, True)
        if self.scale != 1.0:
            weights = weights * self.scale
        return weights, ops.cast(ids, ms.int32)


class RouteSigmoid(nn.Cell):
    """Sigmoid scores; score + bias chooses groups, by the sum of their best two, and in them experts."""

    def __init__(self, local: Local, name: str) -> None:
        super().__init__()
        moe = local.moe
        self.top_k, self.normalise, self.scale = moe.top_k, moe.normalise, moe.scale
        self.groups, self.top_groups, self.experts = moe.groups, moe.top_groups, moe.experts
        self.weight = parameter(name + ".weight", (moe.experts, local.config.hidden), ms.float32)
        self.bias = parameter(name + ".e_score_correction_bias", (moe.experts,), ms.float32)
        self.matmul = ops.MatMul(transpose_b=True)
        self.numbers = Tensor(np.arange(moe.groups, dtype=np.int32))
        self.left_out = Tensor(LEFT_OUT, ms.float32)

    def construct(self, h: Any) -> Any:
        scores = ops.sigmoid(self.matmul(h, self.weight))
        choice = scores + self.bias
        if self.top_groups < self.groups:
            grouped = choice.reshape(-1, self.groups, self.experts // self.groups)
            best, _ = ops.topk(grouped, 2)
            _, chosen = ops.topk(ops.sum(best, -1), self.top_groups)
            chosen = ops.cast(chosen, ms.int32).expand_dims(-1) == self.numbers
            kept = ops.sum(ops.cast(chosen, ms.float32), 1).expand_dims(-1) > 0.5
            choice = ops.select(kept.broadcast_to(grouped.shape), grouped, self.left_out)
            choice = choice.reshape(-1, self.experts)
        _, ids = ops.topk(choice, self.top_k)
        ids = ops.cast(ids, ms.int32)
        weights = ops.gather_elements(scores, 1, ids)
        if self.normalise:
            weights = weights / (ops.sum(weights, -1, True) + 1e-20)
        return weights * self.scale, ids


class ProductOfChosen(nn.Cell):
    """x [N, 1, inner] times the matrix of each row's expert, `ids` [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.BatchMatMul()

    def construct(self, x: Any, ids: Any, matrices: Any) -> Any:
        return self.matmul(x, ops.gather(matrices, ids, 0))


class ProductOfAll(nn.Cell):
    """x [E, C, inner], an expert's rows together, times each expert's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.BatchMatMul()

    def construct(self, x: Any, ids: Any, matrices: Any) -> Any:
        return self.matmul(x, matrices)


class _Experts(nn.Cell):
    """`mine` makes ids of all experts this rank's, [T*k], with a share: 1.0 if it has the expert, else 0.0."""

    def __init__(self, local: Local, matrices: tuple[Matrix, Matrix], start: Any | None) -> None:
        super().__init__()
        hidden = local.config.hidden
        self.count, self.ffn, self.top_k, self.hidden = local.experts, local.expert_ffn, local.moe.top_k, hidden
        self.has_ep = start is not None
        self.gate_up, self.down = matrices
        if self.has_ep:
            self.start = start

    def mine(self, ids: Any, weights: Any) -> Any:
        ids = ids.reshape(-1)
        if not self.has_ep:
            return ids, None, weights
        ids = ids - self.start
        is_mine = ops.logical_and(ids >= 0, ids < self.count)
        share = ops.cast(is_mine, ms.float32)
        weights = weights * share.reshape(-1, self.top_k)
        return ops.select(is_mine, ids, ops.zeros_like(ids)), share.reshape(-1, 1), weights

    def compute(self, x: Any, ids: Any) -> Any:
        gate, up = ops.split(self.gate_up(x, ids), self.ffn, -1)
        return self.down(ops.silu(gate) * up, ids)

    def sum_up(self, y: Any, weights: Any) -> Any:
        y = y.reshape(-1, self.top_k, self.hidden)
        return ops.sum(y * alike(weights.expand_dims(-1), y), 1)


class ExpertsGathered(_Experts):
    """The chosen experts' matrices, one set a token: few tokens.  [T*k, 1, hidden]."""

    def construct(self, h: Any, weights: Any, ids: Any) -> Any:
        tokens = ops.shape(h)[0]
        ids, _, weights = self.mine(ids, weights)
        x = ops.broadcast_to(h.reshape(tokens, 1, 1, self.hidden), (tokens, self.top_k, 1, self.hidden))
        y = self.compute(x.reshape(-1, 1, self.hidden), ids)
        return self.sum_up(y, weights)


class ExpertsGrouped(_Experts):
    """Tokens gathered by expert into [E, C, hidden], C the most that any expert has: computed here, so that it
    always suffices."""

    def __init__(self, local: Local, matrices: tuple[Matrix, Matrix], start: Any | None) -> None:
        super().__init__(local, matrices, start)
        self.numbers = Tensor(np.arange(self.count, dtype=np.int32))
        self.most = ops.ReduceMax()
        self.range = ops.Range()
        self.zero, self.one = Tensor(0, ms.int32), Tensor(1, ms.int32)
        self.scatter = ops.ScatterNd()

    def construct(self, h: Any, weights: Any, ids: Any) -> Any:
        tokens = ops.shape(h)[0]
        ids, share, weights = self.mine(ids, weights)
        shape = (tokens * self.top_k, self.count)
        same = ops.broadcast_to(ids.reshape(-1, 1), shape) == ops.broadcast_to(self.numbers, shape)
        chosen = ops.cast(same, ms.float32)
        x = ops.broadcast_to(h.expand_dims(1), (tokens, self.top_k, self.hidden)).reshape(-1, self.hidden)
        if self.has_ep:  # others' tokens count for nothing: their rows are zeros, added to the first place
            chosen, x = chosen * alike(share, chosen), x * alike(share, x)
        most = ops.maximum(ops.cast(self.most(ops.sum(chosen, 0)), ms.int32), self.one)
        capacity = ops.shape(self.range(self.zero, most, self.one))[0]
        order = ops.cast(ops.sum(ops.cumsum(chosen, 0) * chosen, -1), ms.int32)
        place = ids * capacity + ops.maximum(order - 1, self.zero)
        x = self.scatter(place.reshape(-1, 1), x, (self.count * capacity, self.hidden))
        y = self.compute(x.reshape(self.count, capacity, self.hidden), ids)
        return self.sum_up(ops.gather(y.reshape(-1, self.hidden), place, 0), weights)

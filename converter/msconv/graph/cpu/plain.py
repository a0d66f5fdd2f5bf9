"""CPU operations: float32, base arithmetic only (MindSpore has no fused kernels on CPU).

What MindSpore's CPU kernels are slow at, or keep memory for until the graph has ended, is avoided: arithmetic that
repeats a dimension before the last (it is repeated first: 5 to 10 times faster), transposes of large tensors
(rows are gathered instead), and products of few rows with a transposed weight (`ProductOfFewRows`).

Graphs for one token a sequence have a layout of their own; all others take ragged sequences.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import nn, ops

from ...families.attention import Attention
from ..operations import Operations, collective
from ..parameters import parameter
from ..spec import Local
from .attention import AttendDecode, AttendRagged, BeginDecode, BeginRagged, SplitHeads, WriteKv
from .experts import (
    ExpertsGathered,
    ExpertsGrouped,
    ProductOfAll,
    ProductOfChosen,
    RouteSigmoid,
    RouteSoftmax,
)
from .int8 import DynamicProduct, DynamicProductOfAll, DynamicProductOfChosen, StaticProduct
from .latent import AttendAbsorbed, AttendExpanded, RotateLatent, WriteLatent
from .steps import RaggedStep


class PlainOperations(Operations):
    """MindSpore's own operations."""

    def __init__(self, local: Local) -> None:
        super().__init__(local)
        self.has_one_token = local.role.new_tokens == "one"

    def begin(self) -> nn.Cell:
        return BeginDecode(self.local) if self.has_one_token else BeginRagged(self.local)

    def product(self) -> Any:
        return ProductOfFewRows() if self.has_one_token else super().product()

    def dynamic_product(self) -> Any:
        return DynamicProduct(self.product())

    def static_product(self) -> Any:
        return StaticProduct(self.product())

    def experts_product(self) -> Any:
        return ProductOfChosen() if self.has_one_token else ProductOfAll()

    def dynamic_experts_product(self) -> Any:
        return DynamicProductOfChosen() if self.has_one_token else DynamicProductOfAll()

    def norm(self, name: str, width: int, eps: float) -> nn.Cell:
        return Norm(name, width, eps)

    def add_norm(self, name: str, width: int) -> nn.Cell:
        return AddNorm(name, width, self.local.config.eps)

    def split_heads(self, prefix: str, spec: Attention) -> nn.Cell:
        return SplitHeads(prefix, spec, self.local.config.eps)

    def write_kv(self) -> nn.Cell:
        return WriteKv()

    def attend(self, spec: Attention) -> nn.Cell:
        attend = AttendDecode if self.has_one_token else AttendRagged
        return attend(spec, self.local.windows.index(spec.window))

    def rotate_latent(self) -> nn.Cell:
        return RotateLatent(self.local)

    def write_latent(self) -> nn.Cell:
        return WriteLatent()

    def attend_latent(self, prefix: str, spec: Attention) -> nn.Cell:
        attend = AttendAbsorbed if self.has_one_token else AttendExpanded
        return attend(self.local, spec, self.latent_matrices(prefix), self.local.windows.index(spec.window))

    def route(self, name: str) -> nn.Cell:
        softmax = self.local.moe.scoring == "softmax"
        return RouteSoftmax(self.local, name) if softmax else RouteSigmoid(self.local, name)

    def experts(self, prefix: str) -> nn.Cell:
        experts = ExpertsGathered if self.has_one_token else ExpertsGrouped
        return experts(self.local, self.expert_matrices(prefix), self.expert_start)

    def last_tokens(self) -> nn.Cell:
        return EveryToken() if self.has_one_token else LastTokens()

    def gather_vocab(self) -> nn.Cell:
        return GatherVocab(self.local)


class ProductOfFewRows(nn.Cell):
    """Weight times rows, transposed afterwards: at 16 rows twice as fast as the other way round, at 1 slower."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Any, weight: Any) -> Any:
        return ops.transpose(self.matmul(weight, x), (1, 0))


class Norm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(name, (width,), ms.float32)
        self.mean = ops.ReduceMean(keep_dims=True)
        self.eps = eps
        self.repeat = (1, width)

    def construct(self, x: Any) -> Any:
        return x * ops.tile(ops.rsqrt(self.mean(x * x, -1) + self.eps), self.repeat) * self.weight


class AddNorm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float) -> None:
        super().__init__()
        self.norm = Norm(name, width, eps)

    def construct(self, delta: Any, x: Any) -> Any:
        total = x + delta
        return self.norm(total), total


class LastTokens(nn.Cell):
    def construct(self, h: Any, step: Any) -> Any:
        return ops.gather(h, step[RaggedStep.LAST], 0)


class EveryToken(nn.Cell):
    """Each is the last of its sequence."""

    def construct(self, h: Any, step: Any) -> Any:
        return h


class GatherVocab(nn.Cell):
    """Every rank puts its logits at its own place in a sum: MindSpore's CPU all-gather knows no sub-groups."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.tp, self.local_vocab, self.vocab = local.mesh.tp, local.vocab, local.config.vocab
        if self.tp > 1:
            self.onehot = parameter("rank_onehot", (self.tp, 1, 1), ms.float32)
            self.reduce = collective("AllReduce", op="sum")

    def construct(self, y: Any) -> Any:
        if self.tp == 1:
            return y
        shape = (self.tp, ops.shape(y)[0], self.local_vocab)
        y = self.reduce(ops.broadcast_to(y, shape) * ops.broadcast_to(self.onehot, shape))
        y = y.transpose(1, 0, 2).reshape(-1, self.tp * self.local_vocab)
        if self.tp * self.local_vocab > self.vocab:
            y = y[:, : self.vocab]
        return y

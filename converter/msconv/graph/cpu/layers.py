"""A layer, or half of one, as one operation: MindSpore spends some 60 us on each node, and a layer of small ones
has eleven."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from ...families.attention import Attention
from ..matrix import Matrix
from ..parameters import parameter
from .kernel import kernel
from .steps import CompiledStep


def named(operation: str, matrix: Matrix) -> str:
    """The operation for matrices that are kept as this one: as values, or as codes with a scale a row."""
    return operation if len(matrix.operands()) == 1 else f"{operation}Int8"


class Mlp(nn.Cell):
    """Both products and what is between them."""

    def __init__(self, gate_up: Matrix, down: Matrix) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        inputs = len(gate_up.operands()) + len(down.operands())
        self.run = kernel(named("Mlp", gate_up), lambda x, *others: [x[0], others[inputs // 2][0]], 1 + inputs)

    def construct(self, h: Any) -> Any:
        return self.run(h, *self.gate_up.operands(), *self.down.operands())


class AttentionHalf(nn.Cell):
    """Heads, the writing of the cache, attention, the output projection.  The kernel writes to the graph's own
    inputs, which MindSpore does not know: no other node may read a layer's caches."""

    def __init__(self, qkv: Matrix, o: Matrix, prefix: str, spec: Attention, eps: float) -> None:
        super().__init__()
        self.qkv, self.o = qkv, o
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.bias = (
            parameter(prefix + "qkv_proj.bias", (width,), ms.float32) if spec.bias else Tensor([0.0], ms.float32)
        )
        self.q_norm = parameter(prefix + "q_norm.weight", (spec.head_dim,), ms.float32)
        self.k_norm = parameter(prefix + "k_norm.weight", (spec.head_dim,), ms.float32)
        self.factors = Tensor([spec.scale] * spec.heads + [1.0] * spec.kv_heads, ms.float32)
        self.eps = Tensor([eps], ms.float32)
        matrices = len(qkv.operands()) + len(o.operands())
        first = 13 + len(qkv.operands())  # of o's operands, behind h
        self.run = kernel(named("Attention", qkv), lambda h, *others: [h[0], others[first][0]], 14 + matrices)

    def operands(self, h: Any, step: Any, caches: Any) -> Any:
        """Of the kernel: what makes heads, the caches and the batch, the output projection."""
        heads = (*self.qkv.operands(), self.bias, self.q_norm, self.k_norm, step[CompiledStep.COS])
        heads = (*heads, step[CompiledStep.SIN], self.factors, self.eps)
        batch = (step[CompiledStep.SLOTS], step[CompiledStep.TABLES], step[CompiledStep.CONTEXT_LENS])
        return (h, *heads, caches[0], caches[1], *batch, step[CompiledStep.Q_LENS], *self.o.operands())

    def construct(self, h: Any, step: Any, caches: Any) -> Any:
        return self.run(*self.operands(h, step, caches))


class WholeLayer(nn.Cell):
    """`matrices`: gate_up, down; `norms`: the layer's own, the next layer's."""

    def __init__(
        self, attention: AttentionHalf, matrices: tuple[Matrix, Matrix], norms: tuple[str, str], width: int
    ) -> None:
        super().__init__()
        self.attention = attention
        self.gate_up, self.down = matrices
        self.own, self.following = (parameter(name, (width,), ms.float32) for name in norms)
        inputs = 17 + 4 * len(self.gate_up.operands())
        self.run = kernel(named("Layer", self.gate_up), lambda h, *_: (h, h), inputs, 2)

    def construct(self, h: Any, x: Any, step: Any, caches: Any) -> Any:
        mlp = (*self.gate_up.operands(), *self.down.operands())
        return self.run(*self.attention.operands(h, step, caches), x, self.own, *mlp, self.following)

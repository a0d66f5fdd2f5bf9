"""The operations a target offers.  Each method makes a cell; shapes are per rank (legend: ../decoder.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from msconv_runtime.artifact import GraphInput

from ..parameters import parameter
from ..spec import TP_GROUP, Local


class Ops(ABC):
    """Operations of one target for one phase."""

    dtype: Any  # MindSpore type of weights, activations and cache
    stored: Any  # of matrices: `dtype`, unless a target multiplies with another type than it computes in
    wants_nz = False  # matrices are cast to the NZ format on the device, at load
    page: int | None = None  # slots a page of the caches; None: the server's choice

    def __init__(self, local: Local) -> None:
        self.local = local
        self.matrices: list[str] = []  # weights of matrix products, by name
        self.stored = self.dtype
        some = local.mesh.ep > 1  # one parameter for all layers
        self.expert_start = parameter("expert_start", (1,), ms.int32) if some else None

    def inputs(self) -> list[GraphInput]:
        """Graph inputs before the caches, in call order: those of msconv_runtime.paging.Batch."""
        tokens = [GraphInput(name, "int32", [None]) for name in ("input_ids", "positions", "slots")]
        tables = GraphInput("block_tables", "int32", [None, None])
        return [*tokens, tables, *(GraphInput(name, "int32", [None]) for name in ("context_lens", "q_lens"))]

    @abstractmethod
    def begin(self) -> nn.Cell:
        """All graph inputs, caches included -> step: what the layers share (rotation, masks, places)."""

    def caches(self) -> list[tuple[str, int, int]]:
        """Caches of one layer: (name, heads, width)."""
        c = self.local.config
        if c.mla is not None:
            return [("latent", 1, c.mla.latent)]
        return [(kind, self.local.kv_heads, c.head_dim) for kind in ("k", "v")]

    @abstractmethod
    def norm(self, name: str, width: int, eps: float) -> nn.Cell:
        """RMS norm of the last dimension.  x -> normed."""

    @abstractmethod
    def add_norm(self, name: str, width: int) -> nn.Cell:
        """(delta, x) -> (norm(x + delta), x + delta)."""

    def linear(self, name: str, out: int, inner: int, bias: bool) -> nn.Cell:
        """[T, inner] -> [T, out] with weight [out, inner] and, if asked, bias [out]."""
        self.matrices.append(name + ".weight")
        weight = parameter(name + ".weight", (out, inner), self.stored)
        return Linear(self.product(), weight, parameter(name + ".bias", (out,), self.dtype) if bias else None)

    def product(self) -> Any:
        """(rows [T, inner], weight [out, inner]) -> [T, out]."""
        return ops.MatMul(transpose_b=True)

    def rows(self) -> Any:
        """(table [V, width], ids [T]) -> [T, width] in `dtype`."""
        return Rows()

    @abstractmethod
    def split_heads(self, prefix: str) -> nn.Cell:
        """(qkv [T, (H+2K)*D], step) -> q, k, v; q and k normed per head and rotated."""

    @abstractmethod
    def write_kv(self) -> nn.Cell:
        """(k, v, k_cache, v_cache, step) -> the caches with this step's rows in place."""

    @abstractmethod
    def attend(self) -> nn.Cell:
        """(q, k, v, k_cache, v_cache, step) -> [T, H*D]."""

    @abstractmethod
    def rotate_latent(self) -> nn.Cell:
        """(q [T, H*D], kv [T, R], step) -> q without rotation [T, H, nope], q rotated [T, H, rope], latent before
        its norm [T, kv_lora], the heads' shared key rotated, rope wide."""

    @abstractmethod
    def write_latent(self) -> nn.Cell:
        """(latent, k_rope, cache, step) -> the cache with this step's rows in place."""

    @abstractmethod
    def attend_latent(self, prefix: str) -> nn.Cell:
        """(q_nope, q_rope, latent, k_rope, cache, step) -> [T, H*v_dim]."""

    @abstractmethod
    def route(self, name: str) -> nn.Cell:
        """h [T, hidden] -> weights [T, k], ids [T, k] int32 of the chosen experts."""

    @abstractmethod
    def experts(self, prefix: str) -> nn.Cell:
        """(h, weights, ids) -> [T, hidden]: the weighted sum of what this rank's experts make of each token."""

    def swiglu(self, width: int) -> nn.Cell:
        """[T, 2*width] -> [T, width]: silu of the first half times the second."""
        return Swiglu(width)

    @abstractmethod
    def last_tokens(self) -> nn.Cell:
        """(h [T, hidden], step) -> [B, hidden]: the last row of each sequence."""

    @abstractmethod
    def gather_vocab(self) -> nn.Cell:
        """[B, V/tp] of each rank -> [B, V], padding removed."""

    def embed(self, name: str) -> nn.Cell:
        """ids [T] -> [T, hidden], the vocabulary divided over ranks.  Has the `weight` for a tied head."""
        weight = parameter(name, (self.local.vocab, self.local.config.hidden), self.stored)
        return Embed(self.local, weight, self.rows(), self.dtype)

    def head(self, tied: Any | None) -> nn.Cell:
        """[B, hidden] -> logits [B, V]."""
        weight = tied
        if weight is None:
            self.matrices.append("lm_head.weight")
            weight = parameter("lm_head.weight", (self.local.vocab, self.local.config.hidden), self.stored)
        return Head(self.product(), weight, self.gather_vocab())

    def all_reduce(self, bias: str, width: int) -> nn.Cell:
        """Sum over ranks, then the bias: once, not once a rank."""
        return AllReduce(self.local, parameter(bias, (width,), self.dtype) if bias else None)


def alike(x: Any, other: Any) -> Any:
    """x repeated to the shape of `other`."""
    return ops.broadcast_to(x, ops.shape(other))


def collective(name: str, **attributes: Any) -> Any:
    """A communication primitive that exports without any communication being started.

    `ops.AllGather` asks the running process for the group's size and exports 1: built by hand instead.
    """
    primitive = ops.Primitive(name)
    for key, value in {
        "group": TP_GROUP,
        "index": 0,
        "fusion": 0,
        "no_eliminate": True,
        **attributes,
    }.items():
        primitive.add_prim_attr(key, value)
    return primitive


class AllReduce(nn.Cell):
    def __init__(self, local: Local, bias: Any | None) -> None:
        super().__init__()
        self.many = local.mesh.tp > 1
        self.reduce = collective("AllReduce", op="sum")
        self.has_bias = bias is not None
        if bias is not None:
            self.bias = bias

    def construct(self, x: Any) -> Any:
        if self.many:
            x = self.reduce(x)
        if self.has_bias:
            x = x + self.bias
        return x


class Linear(nn.Cell):
    """x [T, inner] -> [T, out], weight [out, inner]."""

    def __init__(self, product: Any, weight: Any, bias: Any | None) -> None:
        super().__init__()
        self.weight = weight
        self.product = product
        self.has_bias = bias is not None
        if bias is not None:
            self.bias = bias

    def construct(self, x: Any) -> Any:
        y = self.product(x, self.weight)
        if self.has_bias:
            y = y + self.bias
        return y


class Swiglu(nn.Cell):
    """Its parts: the fused primitive takes silu of the first half too, but is neither on CPU nor on 310P."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def construct(self, x: Any) -> Any:
        gate, up = ops.split(x, self.width, -1)
        return ops.silu(gate) * up


class Rows(nn.Cell):
    def construct(self, table: Any, ids: Any) -> Any:
        return ops.gather(table, ids, 0)


class Embed(nn.Cell):
    """Rows of other ranks count as zero; the sum over ranks is the row."""

    def __init__(self, local: Local, weight: Any, rows: Any, dtype: Any) -> None:
        super().__init__()
        self.many = local.mesh.tp > 1
        self.count = local.vocab
        self.dtype = dtype
        self.weight = weight
        self.rows = rows
        self.zero = Tensor(0, ms.int32)
        if self.many:
            self.vocab_start = parameter("vocab_start", (1,), ms.int32)
            self.reduce = AllReduce(local, None)

    def construct(self, ids: Any) -> Any:
        if not self.many:
            return self.rows(self.weight, ids)
        mine = ids - self.vocab_start
        inside = ops.logical_and(mine >= 0, mine < self.count)
        rows = self.rows(self.weight, ops.select(inside, mine, ops.zeros_like(mine)))
        return self.reduce(rows * ops.cast(inside, self.dtype).reshape(-1, 1))


class Head(nn.Cell):
    def __init__(self, product: Any, weight: Any, gather: nn.Cell) -> None:
        super().__init__()
        self.weight = weight
        self.product = product
        self.gather = gather

    def construct(self, h: Any) -> Any:
        return self.gather(self.product(h, self.weight))

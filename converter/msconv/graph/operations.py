"""The operations a target offers: the interface, and what all targets share.

Each method makes a cell; shapes are per rank (legend: decoder.py).  A target's operations are a package beside
this file, by the name in its record, with a function `operations(local)` that gives them or says what they lack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from msconv_runtime.artifact import GraphInput
from msconv_runtime.mindir_check.allowed import TP_GROUP

from ..families.attention import Attention
from ..quant.record import Stored
from .matrix import Decoded, DecodedExperts, Matrix
from .parameters import DTYPES, parameter
from .spec import CannotCompute, Local


def operations_for(local: Local) -> Operations:
    """The operations of a target, in the variant that is asked for.  Raises CannotCompute."""
    package = import_module(f".{local.target.operations}", __package__)
    made: Operations = package.operations(local)
    return made


class Operations(ABC):
    """Operations of one target for one graph."""

    def __init__(self, local: Local) -> None:
        self.local = local
        self.dtype = DTYPES[local.target.dtype]  # of activations, caches, and weights but for `stored_type`
        self.page = local.target.paging.slots
        self.nz: list[str] = []  # matrices that the device keeps in the NZ format
        has_ep = local.mesh.ep > 1  # one parameter for all layers
        self.expert_start = parameter("expert_start", (1,), ms.int32) if has_ep else None

    def inputs(self) -> list[GraphInput]:
        """Graph inputs before the caches, in call order: those of msconv_runtime.paging.Batch, then a mask."""
        target = self.local.target
        tokens = [GraphInput(name, "int32", [None]) for name in ("input_ids", "positions", "slots")]
        tables = GraphInput("block_tables", "int32", [None, None])
        lengths = [GraphInput(name, "int32", [None]) for name in ("context_lens", "q_lens")]
        has_mask = target.mask is not None
        mask = [GraphInput("attention_mask", target.dtype, [None, None], "mask")] if has_mask else []
        return [*tokens, tables, *lengths, *mask]

    @abstractmethod
    def begin(self) -> nn.Cell:
        """All graph inputs, caches included -> step: what layers share (rotation, masks, places).  A tuple whose
        items only these operations know by name."""

    def caches(self, spec: Attention) -> list[tuple[str, int, int]]:
        """Caches of one layer: (name, heads, width)."""
        if spec.kind == "latent":
            return [("latent", 1, self.local.mla.latent)]
        return [(kind, spec.kv_heads, spec.head_dim) for kind in ("k", "v")]

    def stored_type(self, name: str) -> Any:
        """The type in which a matrix is read: `dtype`, unless a target multiplies with the stored one."""
        return self.dtype

    def product(self) -> Any:
        """(rows [T, inner], weight [out, inner]) -> [T, out]."""
        return ops.MatMul(transpose_b=True)

    def product_with(self, decode: Any) -> Any:
        """(rows [T, inner], *tensors) -> [T, out], with the matrix that `decode` makes of the tensors."""
        return Decoded(self.product(), decode)

    @abstractmethod
    def dynamic_product(self) -> Any:
        """(rows [T, inner], codes int8 [out, inner], scales [out, 1]) -> [T, out]: rows become codes with a scale
        each.  Arithmetic: msconv.quant.w8a8."""

    @abstractmethod
    def static_product(self) -> Any:
        """(rows [T, inner], codes int8 [out, inner], deq_scale [out], quant_bias int32 [out], input_scale [1],
        input_offset [1]) -> [T, out]: rows become codes with the input's scale and offset."""

    @abstractmethod
    def experts_product(self) -> Any:
        """(x, places, matrices [E, inner, out]) -> each row of x times the matrix of its expert.  `places`, and
        how x lies, are the target's own."""

    def experts_product_with(self, decode: Any) -> Any:
        """(x, places, *tensors) -> the same, with the matrices that `decode` makes of the tensors."""
        return DecodedExperts(self.experts_product(), decode)

    @abstractmethod
    def dynamic_experts_product(self) -> Any:
        """(x, places, codes int8 [E, inner, out], scales [E, 1, out]) -> the same, rows as codes with a scale
        each."""

    def static_experts_product(self) -> Any:
        raise CannotCompute(
            f"{self.local.title}: its experts' inputs have one scale for all tokens: only a scale a token is "
            "computed.",
            "Quantise the experts as W8A8_DYNAMIC.",
        )

    def read_type(self, tensor: Stored, shape: tuple[int, ...]) -> Any:
        """The type in which products of codes read a tensor that every artifact stores alike: as it is stored,
        unless the target's operations want another.  `shape`: the matrix's."""
        return DTYPES[tensor.dtype]

    def matrix(self, name: str, shape: tuple[int, ...], dtype: Any | None = None, nz: bool = True) -> Matrix:
        """The matrix of that name, [out, inner] or [E, inner, out], as it is stored.  `dtype`: the type it is read
        in, if not `stored_type`.  `nz`: the device may keep it in the NZ format."""
        kept = self.local.kept(name)
        decode = kept.values(self)
        if nz and self.local.target.nz and decode is None and not kept.stored[0].dtype:
            self.nz.append(name)

        def read_type(tensor: Stored) -> Any:
            if not tensor.dtype:
                return dtype or self.stored_type(tensor.of(name))
            return self.read_type(tensor, shape) if decode is None else DTYPES[tensor.dtype]

        parameters = [parameter(t.of(name), t.local_shape(shape), read_type(t)) for t in kept.stored]
        multiply = kept.multiply_experts if len(shape) == 3 else kept.multiply
        return Matrix(parameters, multiply(self), decode)

    def linear(self, name: str, out: int, inner: int, bias: bool) -> nn.Cell:
        """[T, inner] -> [T, out] with weight [out, inner] and, if asked, bias [out]."""
        matrix = self.matrix(name + ".weight", (out, inner))
        return Linear(matrix, parameter(name + ".bias", (out,), self.dtype)) if bias else matrix

    def latent_matrices(self, prefix: str) -> tuple[Matrix, Matrix]:
        """What makes keys [H*nope, kv_lora] and values [H*v_dim, kv_lora] of a latent: read in `dtype`."""
        heads, mla = self.local.heads, self.local.mla
        for name in (prefix + "kv_b_proj_k.weight", prefix + "kv_b_proj_v.weight"):
            kept = self.local.kept(name)
            if kept.stored[0].dtype and kept.values(self) is None:
                raise CannotCompute(
                    f"{self.local.title}: {name} is stored as codes: it is multiplied with what has no scale.",
                    "Leave kv_b_proj as values when you quantise.",
                )
        key = self.matrix(prefix + "kv_b_proj_k.weight", (heads * mla.nope, mla.kv_lora), self.dtype, nz=False)
        value = self.matrix(prefix + "kv_b_proj_v.weight", (heads * mla.v_dim, mla.kv_lora), self.dtype, nz=False)
        key.name_product("matmul")
        value.name_product("matmul")
        return key, value

    def expert_matrices(self, prefix: str) -> tuple[Matrix, Matrix]:
        """Matrices of this rank's experts: gate and up fused [E, hidden, 2*ffn], down [E, ffn, hidden]."""
        count, hidden, ffn = self.local.experts, self.local.config.hidden, self.local.expert_ffn
        gate_up = self.matrix(prefix + "gate_up_proj.weight", (count, hidden, 2 * ffn))
        return gate_up, self.matrix(prefix + "down_proj.weight", (count, ffn, hidden))

    @abstractmethod
    def norm(self, name: str, width: int, eps: float) -> nn.Cell:
        """RMS norm of the last dimension.  x -> normed."""

    @abstractmethod
    def add_norm(self, name: str, width: int) -> nn.Cell:
        """(delta, x) -> (norm(x + delta), x + delta)."""

    def shifted(self, norm: nn.Cell, name: str, width: int) -> nn.Cell:
        """The norm, or sum and norm, whose weight has this name, with the bias that is stored beside it, if any:
        what quantisation shifted activations by."""
        bias = name.removesuffix(".weight") + ".bias"
        return Shifted(norm, parameter(bias, (width,), self.dtype)) if bias in self.local.types else norm

    def rows(self) -> Any:
        """(table [V, width], ids [T]) -> [T, width] in `dtype`."""
        return Rows()

    @abstractmethod
    def split_heads(self, prefix: str, spec: Attention) -> nn.Cell:
        """(qkv [T, (H+2K)*D], step) -> q, k, v; q and k rotated, and normed per head where the spec says so."""

    @abstractmethod
    def write_kv(self) -> nn.Cell:
        """(k, v, k_cache, v_cache, step) -> the caches with this step's rows in place."""

    @abstractmethod
    def attend(self, spec: Attention) -> nn.Cell:
        """(q, k, v, k_cache, v_cache, step) -> [T, H*D]."""

    @abstractmethod
    def rotate_latent(self) -> nn.Cell:
        """(q [T, H*D], kv [T, R], step) -> q without rotation [T, H, nope], q rotated [T, H, rope], latent before
        its norm [T, kv_lora], the heads' shared key rotated, rope wide."""

    @abstractmethod
    def write_latent(self) -> nn.Cell:
        """(latent, k_rope, cache, step) -> the cache with this step's rows in place."""

    @abstractmethod
    def attend_latent(self, prefix: str, spec: Attention) -> nn.Cell:
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

    def whole_mlp(self, prefix: str, hidden: int, ffn: int) -> nn.Cell | None:
        """h [T, hidden] -> down(silu(gate(h)) * up(h)), where a target has one operation for matrices that are
        kept as these are; None: it is made of its parts."""
        return None

    def whole_attention(self, prefix: str, hidden: int, spec: Attention) -> nn.Cell | None:
        """(h [T, hidden], step, caches of the layer) -> [T, hidden of the model]: heads, cache write, attention
        and the output projection, this rank's share of its sum, where a target has one operation for it."""
        return None

    def whole_layer(self, index: int, follower: str) -> nn.Cell | None:
        """(h, x, step, caches of the layer) -> (h, x): a layer, and the norm named `follower`, where a target has
        one operation for it."""
        return None

    @abstractmethod
    def last_tokens(self) -> nn.Cell:
        """(h [T, hidden], step) -> [B, hidden]: the last row of each sequence."""

    @abstractmethod
    def gather_vocab(self) -> nn.Cell:
        """[B, V/tp] of each rank -> [B, V], padding removed."""

    def embed(self, name: str) -> nn.Cell:
        """ids [T] -> [T, hidden], the vocabulary divided over ranks.  Has the `weight` for a tied head."""
        weight = parameter(name, (self.local.vocab, self.local.config.hidden), self.stored_type(name))
        return Embed(self.local, weight, self.rows(), self.dtype)

    def head(self, tied: Any | None) -> nn.Cell:
        """[B, hidden] -> logits [B, V].  `tied`: the embedding's weight, if that is the head's too."""
        if tied is not None:
            return Head(Matrix([tied], self.product(), None), self.gather_vocab())
        size = (self.local.vocab, self.local.config.hidden)
        return Head(self.matrix("lm_head.weight", size), self.gather_vocab())

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
        self.is_sharded = local.mesh.tp > 1
        self.reduce = collective("AllReduce", op="sum")
        self.has_bias = bias is not None
        if bias is not None:
            self.bias = bias

    def construct(self, x: Any) -> Any:
        if self.is_sharded:
            x = self.reduce(x)
        if self.has_bias:
            x = x + self.bias
        return x


class Linear(nn.Cell):
    """x [T, inner] -> [T, out], with a bias [out]."""

    def __init__(self, matrix: Matrix, bias: Any) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias

    def construct(self, x: Any) -> Any:
        return self.matrix(x) + self.bias


class Shifted(nn.Cell):
    """A norm with a bias: of a sum and norm it is added to the norm."""

    def __init__(self, norm: nn.Cell, bias: Any) -> None:
        super().__init__()
        self.norm = norm
        self.bias = bias

    def construct(self, *x: Any) -> Any:
        found = self.norm(*x)
        if isinstance(found, tuple):
            return found[0] + self.bias, found[1]
        return found + self.bias


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

    def __init__(self, local: Local, weight: Any, rows: Any, dtype: Any, start: str = "vocab_start") -> None:
        """`start`: the name of the constant that says which row of the whole table is this rank's first."""
        super().__init__()
        self.is_sharded = local.mesh.tp > 1
        self.count = weight.shape[0]
        self.dtype = dtype
        self.weight = weight
        self.rows = rows
        self.zero = Tensor(0, ms.int32)
        if self.is_sharded:
            self.vocab_start = parameter(start, (1,), ms.int32)
            self.reduce = AllReduce(local, None)

    def construct(self, ids: Any) -> Any:
        if not self.is_sharded:
            return self.rows(self.weight, ids)
        mine = ids - self.vocab_start
        inside = ops.logical_and(mine >= 0, mine < self.count)
        rows = self.rows(self.weight, ops.select(inside, mine, ops.zeros_like(mine)))
        return self.reduce(rows * ops.cast(inside, self.dtype).reshape(-1, 1))


class Head(nn.Cell):
    def __init__(self, matrix: Matrix, gather: nn.Cell) -> None:
        super().__init__()
        self.matrix = matrix
        self.gather = gather

    def construct(self, h: Any) -> Any:
        return self.gather(self.matrix(h))

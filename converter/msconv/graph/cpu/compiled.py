"""CPU operations as compiled kernels: one graph for prompts and for decoding, matrices in their stored type.

The kernels' C++ is in msconv_runtime.kernels, and is built where the graph runs.  Here a kernel is a name and the
shape of its result: exporting needs no compiler.  Routing, rotations and the writing of caches stay MindSpore's.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from ...families.attention import Attention
from ...quant.record import MATRIX
from ...quant.w8a8 import W8A8Dynamic
from ..matrix import Matrix
from ..parameters import DTYPES, parameter
from ..spec import CannotCompute, Local
from .attention import Angles, Rotation
from .kernel import kernel
from .latent import Absorbed
from .layers import AttentionHalf, Mlp, WholeLayer
from .plain import PlainOperations
from .steps import CompiledStep

STORED = ("float32", "bfloat16")  # what kernels multiply with as it is stored; all else is read as float32


class CompiledOperations(PlainOperations):
    """Ragged sequences, in kernels."""

    def begin(self) -> nn.Cell:
        return Begin(self.local)

    def stored_type(self, name: str) -> Any:
        stored = self.local.types.get(name, "")
        return DTYPES[stored] if stored in STORED else self.dtype

    def product(self) -> Any:
        return kernel("Product", lambda x, weight: [x[0], weight[0]], 2)

    def dynamic_product(self) -> Any:
        return kernel("ProductInt8", lambda x, weight, *_: [x[0], weight[0]], 3)

    def static_product(self) -> Any:
        return kernel("ProductInt8Static", lambda x, weight, *_: [x[0], weight[0]], 6)

    def experts_product(self) -> Any:
        """Of both matrices of the experts at once, and so are the others: called as `Experts` calls it."""
        return kernel("Experts", lambda h, *_: h, 6)

    def experts_product_with(self, decode: Any) -> Any:
        return self.experts_product()

    def dynamic_experts_product(self) -> Any:
        return kernel("ExpertsInt8", lambda h, *_: h, 8)

    def rows(self) -> Any:
        return kernel("Rows", lambda table, ids: [ids[0], table[1]], 2)

    def norm(self, name: str, width: int, eps: float) -> nn.Cell:
        return Norm(name, width, eps)

    def add_norm(self, name: str, width: int) -> nn.Cell:
        return AddNorm(name, width, self.local.config.eps)

    def swiglu(self, width: int) -> nn.Cell:
        return Swiglu(width)

    def split_heads(self, prefix: str, spec: Attention) -> nn.Cell:
        return SplitHeads(prefix, spec, self.local.config.eps)

    def attend(self, spec: Attention) -> nn.Cell:
        return Attend()

    def attend_latent(self, prefix: str, spec: Attention) -> nn.Cell:
        return AttendLatent(self.local, spec, self.latent_matrices(prefix))

    def whole_mlp(self, prefix: str, hidden: int, ffn: int) -> nn.Cell | None:
        gate_up, down = prefix + "gate_up_proj.weight", prefix + "down_proj.weight"
        if not self._are_alike(gate_up, down):
            return None
        return Mlp(self.matrix(gate_up, (2 * ffn, hidden)), self.matrix(down, (hidden, ffn)))

    def whole_attention(self, prefix: str, hidden: int, spec: Attention) -> nn.Cell | None:
        qkv, o = prefix + "qkv_proj.weight", prefix + "o_proj.weight"
        if not self._are_alike(qkv, o):
            return None
        inner = spec.heads * spec.head_dim
        qkv_matrix = self.matrix(qkv, (inner + 2 * spec.kv_heads * spec.head_dim, hidden))
        o_matrix = self.matrix(o, (self.local.config.hidden, inner))
        return AttentionHalf(qkv_matrix, o_matrix, prefix, spec, self.local.config.eps)

    def whole_layer(self, index: int, follower: str) -> nn.Cell | None:
        """Of one rank's layers without experts: between several ranks, sums are taken in the middle."""
        local, prefix = self.local, f"model.layers.{index}."
        own = prefix + "post_attention_layernorm.weight"
        spec, hidden, ffn = local.attention(index), local.config.hidden, local.ffn
        gate_up, down = prefix + "mlp.gate_up_proj.weight", prefix + "mlp.down_proj.weight"
        of_attention = (f"{prefix}self_attn.{name}_proj.weight" for name in ("qkv", "o"))
        if not self._is_in_one_piece(index, own, follower) or not self._are_alike(*of_attention, gate_up, down):
            return None
        attention = self.whole_attention(prefix + "self_attn.", hidden, spec)
        assert isinstance(attention, AttentionHalf)
        matrices = self.matrix(gate_up, (2 * ffn, hidden)), self.matrix(down, (hidden, ffn))
        return WholeLayer(attention, matrices, (own, follower), hidden)

    def _is_in_one_piece(self, index: int, *norms: str) -> bool:
        """Whether it has no sum over ranks, no experts, no bias behind its attention or in these norms."""
        local = self.local
        has_biases = any(name.removesuffix("weight") + "bias" in local.types for name in norms)
        parted = local.mesh.tp > 1 or local.config.has_experts(index) or local.attention(index).output_bias
        return not parted and not has_biases

    def _are_alike(self, *matrices: str) -> bool:
        """Whether all are kept as values, or all as codes whose activations get a scale a token."""
        return self._are_values(*matrices) or self._are_codes(*matrices)

    def _are_values(self, *matrices: str) -> bool:
        """Whether each is kept as values, one tensor."""
        kept = [self.local.kept(name) for name in matrices]
        return all(k.stored == (MATRIX,) and k.values(self) is None for k in kept)

    def _are_codes(self, *matrices: str) -> bool:
        """Whether each is kept as codes whose activations get a scale a token."""
        return all(isinstance(self.local.kept(name), W8A8Dynamic) for name in matrices)

    def experts(self, prefix: str) -> nn.Cell:
        gate_up, down = (self.local.kept(prefix + name) for name in ("gate_up_proj.weight", "down_proj.weight"))
        if gate_up != down:
            raise CannotCompute(
                f"{self.local.title}: the compiled kernels take experts whose matrices are all stored alike; of "
                f"{prefix}*, gate_up_proj and down_proj are not.",
                "The target's other graphs serve it.",
            )
        return Experts(self.expert_matrices(prefix), self.expert_start)

    def last_tokens(self) -> nn.Cell:
        return LastTokens()


class Begin(nn.Cell):
    """Gives a step as CompiledStep names it."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.rotation = Angles(local) if local.config.mla is None else Rotation(local)

    def construct(self, inputs: Any) -> Any:
        _, positions, slots, tables, context_lens, q_lens = inputs[:6]
        cos, sin = self.rotation(positions)
        last = ops.cast(ops.cumsum(q_lens, 0), ms.int32) - 1
        return cos, sin, slots, tables, context_lens, q_lens, last


class Norm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(name, (width,), ms.float32)
        self.eps = Tensor([eps], ms.float32)
        self.run = kernel("Norm", lambda x, *_: x, 3)

    def construct(self, x: Any) -> Any:
        return self.run(x, self.weight, self.eps)


class AddNorm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(name, (width,), ms.float32)
        self.eps = Tensor([eps], ms.float32)
        self.run = kernel("AddNorm", lambda delta, x, *_: (x, x), 4, 2)

    def construct(self, delta: Any, x: Any) -> Any:
        return self.run(delta, x, self.weight, self.eps)


class Swiglu(nn.Cell):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.run = kernel("Swiglu", lambda x: [x[0], width], 1)

    def construct(self, x: Any) -> Any:
        return self.run(x)


class SplitHeads(nn.Cell):
    """q [T, H, D], scaled for the softmax; k and v as rows of the cache, [T, 1, K, D]."""

    KERNEL, INPUTS = "SplitHeads", 7

    def __init__(self, prefix: str, spec: Attention, eps: float) -> None:
        super().__init__()
        heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
        self.q_norm = parameter(prefix + "q_norm.weight", (dim,), ms.float32)
        self.k_norm = parameter(prefix + "k_norm.weight", (dim,), ms.float32)
        self.factors = Tensor([spec.scale] * heads + [1.0] * kv_heads, ms.float32)
        self.eps = Tensor([eps], ms.float32)

        def shapes(qkv: Any, *_: Any) -> Any:
            rows = [qkv[0], 1, kv_heads, dim]
            return [qkv[0], heads, dim], rows, rows

        self.run = kernel(self.KERNEL, shapes, self.INPUTS, 3)

    def operands(self, step: Any) -> Any:
        return self.q_norm, self.k_norm, step[CompiledStep.COS], step[CompiledStep.SIN], self.factors, self.eps

    def construct(self, qkv: Any, step: Any) -> Any:
        return self.run(qkv, *self.operands(step))


class Attend(nn.Cell):
    """To everything cached up to each token's own position."""

    def __init__(self) -> None:
        super().__init__()
        self.run = kernel("Attend", lambda q, *_: [q[0], q[1] * q[2]], 6)

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        return self.run(
            q,
            k_cache,
            v_cache,
            step[CompiledStep.TABLES],
            step[CompiledStep.CONTEXT_LENS],
            step[CompiledStep.Q_LENS],
        )


class AttendLatent(Absorbed):
    """All heads read the cache of latents as their keys and as their values."""

    def __init__(self, local: Local, spec: Attention, matrices: tuple[Matrix, Matrix]) -> None:
        super().__init__(local, spec, matrices)
        self.attend = Attend()

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        q = self.into_latents(q_nope, q_rope)
        mixed = self.attend(q, latent, k_rope, cache, cache, step).reshape(-1, self.heads, self.latent)
        return self.out_of_latents(mixed)


class Experts(nn.Cell):
    """Each expert's tokens gathered and multiplied; experts of other ranks are passed over."""

    def __init__(self, matrices: tuple[Matrix, Matrix], start: Any | None) -> None:
        super().__init__()
        self.gate_up, self.down = matrices
        self.start = Tensor([0], ms.int32) if start is None else start
        self.run = self.gate_up.product

    def construct(self, h: Any, weights: Any, ids: Any) -> Any:
        return self.run(h, weights, ids, self.start, *self.gate_up.operands(), *self.down.operands())


class LastTokens(nn.Cell):
    def construct(self, h: Any, step: Any) -> Any:
        return ops.gather(h, step[CompiledStep.LAST], 0)

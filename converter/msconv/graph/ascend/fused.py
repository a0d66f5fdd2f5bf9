"""Ascend operations: the fused primitives that SGLang's and vLLM's MindSpore models use.

Layouts and masks are those of SGLang's slot (srt/models/mindspore.py): the cache is [pages, page, K, D];
graphs for new sequences attend to their tokens only, those for other roles read the cache (decode, chunked
prefill, prefix hits, verification of drafts).  Nothing here has run on a device; what each primitive is taken to
compute is written beside its kernel in msconv/mindir/kernels.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import auto_generate as fused
from mindspore.ops.operations.nn_ops import PagedAttention, ReshapeAndCache

from msconv_runtime.targets import SWIGLU

from ...families.attention import Attention
from ...quant.record import Stored
from ...quant.w8a8 import DEQ_SCALES, SCALES
from ..operations import Operations, collective
from ..parameters import parameter
from ..rope import frequencies
from ..spec import CannotCompute, Local
from .experts import Experts, GroupedProduct, RouteSigmoid, RouteSoftmax
from .int8 import DynamicGroupedProduct, DynamicProduct, StaticProduct
from .latent import AttendAbsorbed, AttendExpanded, RotateLatent, WriteLatent, flash_attention
from .steps import AscendStep

HALF_ROTATION = 2  # ApplyRotaryPosEmb's cos_format: x*cos + (-x2, x1)*sin, cos and sin [T, D]


class AscendOperations(Operations):
    """Fused primitives, in the target's type."""

    def __init__(self, local: Local) -> None:
        super().__init__(local)
        self.reads_cache = not local.role.begins or local.target.prefill_reads_cache
        self.has_swiglu = SWIGLU in local.fused

    def begin(self) -> nn.Cell:
        return Begin(self.local, self.dtype)

    def dynamic_product(self) -> Any:
        self._needs_token_scales()
        return DynamicProduct(self.dtype)

    def static_product(self) -> Any:
        return StaticProduct(self.dtype)

    def experts_product(self) -> Any:
        return GroupedProduct(self.local)

    def dynamic_experts_product(self) -> Any:
        self._needs_token_scales()
        return DynamicGroupedProduct(self.local, self.dtype)

    def read_type(self, tensor: Stored, shape: tuple[int, ...]) -> Any:
        """GroupedMatmulV4 gives the type of its scales, whatever it is asked for; QuantBatchMatmul takes those of
        float16 products as the bits of float32 in int64."""
        if tensor == SCALES and len(shape) == 3:
            return self.dtype
        if tensor == DEQ_SCALES and self.local.target.dtype == "float16":
            return ms.int64
        return super().read_type(tensor, shape)

    def _needs_token_scales(self) -> None:
        if not self.local.target.token_scales:
            raise CannotCompute(
                f"{self.local.title}: its products of int8 take no scale a token (aclnnQuantMatmulV4, CANN 8.2 "
                "to 8.5), which W8A8_DYNAMIC needs.",
                "Quantise as W8A8 with one scale an input, or serve it on another target.",
            )

    def norm(self, name: str, width: int, eps: float) -> nn.Cell:
        return Norm(name, width, eps, self.dtype)

    def add_norm(self, name: str, width: int) -> nn.Cell:
        return AddNorm(name, width, self.local.config.eps, self.dtype)

    def split_heads(self, prefix: str, spec: Attention) -> nn.Cell:
        return SplitHeads(prefix, spec, self.local.config.eps, self.dtype)

    def write_kv(self) -> nn.Cell:
        return WriteKv()

    def attend(self, spec: Attention) -> nn.Cell:
        return AttendPaged(spec) if self.reads_cache else AttendFlash(spec)

    def rotate_latent(self) -> nn.Cell:
        return RotateLatent(self.local, HALF_ROTATION)

    def write_latent(self) -> nn.Cell:
        return WriteLatent()

    def attend_latent(self, prefix: str, spec: Attention) -> nn.Cell:
        attend = AttendAbsorbed if self.reads_cache else AttendExpanded
        return attend(self.local, spec, self.latent_matrices(prefix))

    def route(self, name: str) -> nn.Cell:
        route = RouteSoftmax if self.local.moe.scoring == "softmax" else RouteSigmoid
        return route(self.local, name, self.dtype)

    def experts(self, prefix: str) -> nn.Cell:
        return Experts(
            self.local,
            self.expert_matrices(prefix),
            self.expert_start,
            FusedSwiglu() if self.has_swiglu else None,
        )

    def swiglu(self, width: int) -> nn.Cell:
        return FusedSwiglu() if self.has_swiglu else super().swiglu(width)

    def last_tokens(self) -> nn.Cell:
        return LastTokens()

    def gather_vocab(self) -> nn.Cell:
        return GatherVocab(self.local)


class Begin(nn.Cell):
    """Gives a step as AscendStep names it.  Angles in float32: a table in bfloat16 would round them, and one a
    layer costs gigabytes."""

    def __init__(self, local: Local, dtype: Any) -> None:
        super().__init__()
        inv, self.factor = frequencies(local.config.rope, local.config.rope_dim)
        self.inv = Tensor(np.concatenate([inv, inv]), ms.float32)
        self.dtype = dtype

    def construct(self, inputs: Any) -> Any:
        _, positions, slots, tables, context_lens, q_lens, mask = inputs[:7]
        angle = ops.cast(positions, ms.float32).reshape(-1, 1) * self.inv
        cos = ops.cast(ops.cos(angle) * self.factor, self.dtype)
        sin = ops.cast(ops.sin(angle) * self.factor, self.dtype)
        return cos, sin, slots, tables, context_lens, q_lens, mask


class Norm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float, dtype: Any) -> None:
        super().__init__()
        self.weight = parameter(name, (width,), dtype)
        self.eps = eps

    def construct(self, x: Any) -> Any:
        return fused.rms_norm(x, self.weight, self.eps)[0]


class AddNorm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float, dtype: Any) -> None:
        super().__init__()
        self.weight = parameter(name, (width,), dtype)
        self.eps = eps

    def construct(self, delta: Any, x: Any) -> Any:
        normed, _, total = fused.add_rms_norm(delta, x, self.weight, self.eps)
        return normed, total


class FusedSwiglu(nn.Cell):
    """[.., 2*width] -> [.., width]: silu of the first half times the second, by the one primitive."""

    def __init__(self) -> None:
        super().__init__()
        self.run = fused.Swiglu()

    def construct(self, x: Any) -> Any:
        return self.run(x, -1)


class SplitHeads(nn.Cell):
    """q [T, H*D], k and v [T, K*D]."""

    def __init__(self, prefix: str, spec: Attention, eps: float, dtype: Any) -> None:
        super().__init__()
        self.dim = spec.head_dim
        self.q_width, self.kv_width = spec.heads * self.dim, spec.kv_heads * self.dim
        self.has_norm = spec.qk_norm
        if spec.qk_norm:
            self.q_norm = Norm(prefix + "q_norm.weight", self.dim, eps, dtype)
            self.k_norm = Norm(prefix + "k_norm.weight", self.dim, eps, dtype)
        self.rotate = ops.ApplyRotaryPosEmb(HALF_ROTATION)

    def construct(self, qkv: Any, step: Any) -> Any:
        q, k, v = ops.split(qkv, (self.q_width, self.kv_width, self.kv_width), -1)
        if self.has_norm:
            q = self.q_norm(q.reshape(-1, self.dim)).reshape(-1, self.q_width)
            k = self.k_norm(k.reshape(-1, self.dim)).reshape(-1, self.kv_width)
        q, k = self.rotate(q, k, step[AscendStep.COS], step[AscendStep.SIN], step[AscendStep.CONTEXT_LENS])
        return q, k, v


class WriteKv(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = ReshapeAndCache()

    def construct(self, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        written = self.write(k, v, k_cache, v_cache, step[AscendStep.SLOTS])
        return ops.depend(k_cache, written), ops.depend(v_cache, written)


class AttendFlash(nn.Cell):
    """No cached prefix: this step's own keys and values, ragged, layout TH."""

    def __init__(self, spec: Attention) -> None:
        super().__init__()
        self.attend = flash_attention(spec)

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        k = ops.depend(k, k_cache)  # the cache is written even if only later steps read it
        return self.attend(
            q,
            k,
            v,
            None,
            None,
            None,
            step[AscendStep.MASK],
            None,
            step[AscendStep.Q_LENS],
            step[AscendStep.CONTEXT_LENS],
        )[3]


class AttendPaged(nn.Cell):
    """Keys and values from the cache, whatever the number of new tokens."""

    def __init__(self, spec: Attention) -> None:
        super().__init__()
        self.attend = PagedAttention(head_num=spec.heads, scale_value=spec.scale, kv_head_num=spec.kv_heads)

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        lens = step[AscendStep.CONTEXT_LENS]
        return self.attend(
            q,
            k_cache,
            v_cache,
            step[AscendStep.TABLES],
            lens,
            None,
            None,
            step[AscendStep.MASK],
            step[AscendStep.Q_LENS],
        )


class LastTokens(nn.Cell):
    def construct(self, h: Any, step: Any) -> Any:
        return ops.gather(h, ops.cumsum(step[AscendStep.Q_LENS], 0) - 1, 0)


class GatherVocab(nn.Cell):
    """AllGather joins along rows: [tp*B, V/tp], made into [B, V] float32 without the padding."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.tp, self.local_vocab, self.vocab = local.mesh.tp, local.vocab, local.config.vocab
        self.gather = collective("AllGather", rank_size=local.mesh.tp)

    def construct(self, y: Any) -> Any:
        if self.tp > 1:
            y = self.gather(y).reshape(self.tp, -1, self.local_vocab)
            y = y.transpose(1, 0, 2).reshape(-1, self.tp * self.local_vocab)
        if self.tp * self.local_vocab > self.vocab:
            y = y[:, : self.vocab]
        return ops.cast(y, ms.float32)

"""Ascend operations: the fused primitives that SGLang's and vLLM's MindSpore models use.

Layouts and masks are those of SGLang's slot (srt/models/mindspore.py): the cache is [pages, page, K, D];
`prefill` is for batches without any cached prefix, `decode` for all others (decode, chunked prefill, prefix
hits, verification of drafts).  Nothing here has run on a device; what each primitive is taken to compute is
written beside its kernel in msconv/verify/kernels.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import auto_generate as fused
from mindspore.ops.operations.nn_ops import FlashAttentionScore, PagedAttention, ReshapeAndCache

from msconv_runtime.artifact import GraphInput

from ..parameters import parameter
from ..rope import frequencies
from ..spec import Local
from .ascend_latent import AttendAbsorbed, AttendExpanded, RotateLatent, WriteLatent
from .ascend_moe import Experts, RouteSigmoid, RouteSoftmax
from .base import Ops, collective

HALF_ROTATION = 2  # ApplyRotaryPosEmb's cos_format: x*cos + (-x2, x1)*sin, cos and sin [T, D]


class AscendOps(Ops):
    """bfloat16, for 910B and 910C."""

    dtype = ms.bfloat16
    dtype_name = "bfloat16"

    def inputs(self) -> list[GraphInput]:
        return [*super().inputs(), GraphInput("attention_mask", self.dtype_name, [None, None], "mask")]

    def begin(self) -> nn.Cell:
        return Begin(self.local, self.dtype)

    def norm(self, name: str, width: int, eps: float) -> nn.Cell:
        return Norm(name, width, eps, self.dtype)

    def add_norm(self, name: str, width: int) -> nn.Cell:
        return AddNorm(name, width, self.local.config.eps, self.dtype)

    def split_heads(self, prefix: str) -> nn.Cell:
        return SplitHeads(self.local, prefix, self.dtype)

    def write_kv(self) -> nn.Cell:
        return WriteKv()

    def attend(self) -> nn.Cell:
        return AttendFlash(self.local) if self.local.phase == "prefill" else AttendPaged(self.local)

    def rotate_latent(self) -> nn.Cell:
        return RotateLatent(self.local, HALF_ROTATION)

    def write_latent(self) -> nn.Cell:
        return WriteLatent()

    def attend_latent(self, prefix: str) -> nn.Cell:
        attend = AttendExpanded if self.local.phase == "prefill" else AttendAbsorbed
        return attend(self.local, prefix, self.dtype)

    def route(self, name: str) -> nn.Cell:
        route = RouteSoftmax if self.local.moe.scoring == "softmax" else RouteSigmoid
        return route(self.local, name, self.dtype)

    def experts(self, prefix: str) -> nn.Cell:
        self.matrices += [prefix + "gate_up_proj.weight", prefix + "down_proj.weight"]
        return Experts(self.local, prefix, self.dtype, self.expert_start, plain=self.wants_nz)

    def last_tokens(self) -> nn.Cell:
        return LastTokens(self.local.phase == "decode_all")

    def gather_vocab(self) -> nn.Cell:
        return GatherVocab(self.local)


class Ascend310POps(AscendOps):
    """float16 only."""

    dtype = ms.float16
    dtype_name = "float16"
    wants_nz = True


class Begin(nn.Cell):
    """step = cos [T, D], sin [T, D], slots, tables, context_lens, q_lens, mask.  Angles in float32: a table in
    bfloat16 would round them, and one table a layer costs gigabytes."""

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


class SplitHeads(nn.Cell):
    """q [T, H*D], k and v [T, K*D]."""

    def __init__(self, local: Local, prefix: str, dtype: Any) -> None:
        super().__init__()
        c = local.config
        self.q_width, self.kv_width, self.dim = local.heads * c.head_dim, local.kv_heads * c.head_dim, c.head_dim
        self.q_norm = Norm(prefix + "q_norm.weight", c.head_dim, c.eps, dtype)
        self.k_norm = Norm(prefix + "k_norm.weight", c.head_dim, c.eps, dtype)
        self.rotate = ops.ApplyRotaryPosEmb(HALF_ROTATION)

    def construct(self, qkv: Any, step: Any) -> Any:
        q, k, v = ops.split(qkv, (self.q_width, self.kv_width, self.kv_width), -1)
        q = self.q_norm(q.reshape(-1, self.dim)).reshape(-1, self.q_width)
        k = self.k_norm(k.reshape(-1, self.dim)).reshape(-1, self.kv_width)
        q, k = self.rotate(q, k, step[0], step[1], step[4])
        return q, k, v


class WriteKv(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = ReshapeAndCache()

    def construct(self, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        written = self.write(k, v, k_cache, v_cache, step[2])
        return ops.depend(k_cache, written), ops.depend(v_cache, written)


class AttendFlash(nn.Cell):
    """No cached prefix: this step's own keys and values, ragged, layout TH."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.attend = FlashAttentionScore(
            head_num=local.heads,
            scale_value=local.config.softmax_scale,
            next_tokens=0,
            input_layout="TH",
        )

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        k = ops.depend(k, k_cache)  # the cache is written even if only later steps read it
        return self.attend(q, k, v, None, None, None, step[6], None, step[5], step[4])[3]


class AttendPaged(nn.Cell):
    """Keys and values from the cache, whatever the number of new tokens."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.attend = PagedAttention(
            head_num=local.heads,
            scale_value=local.config.softmax_scale,
            kv_head_num=local.kv_heads,
        )

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        return self.attend(q, k_cache, v_cache, step[3], step[4], None, None, step[6], step[5])


class LastTokens(nn.Cell):
    def __init__(self, everything: bool) -> None:
        super().__init__()
        self.everything = everything

    def construct(self, h: Any, step: Any) -> Any:
        if self.everything:
            return h
        return ops.gather(h, ops.cumsum(step[5], 0) - 1, 0)


class GatherVocab(nn.Cell):
    """AllGather joins along rows: [tp*B, V/tp], turned into [B, V] float32 without the padding."""

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

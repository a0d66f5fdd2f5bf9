"""Latent attention with Ascend's fused primitives, as sgl-mindspore's DeepSeek uses them.

The cache is [pages, page, 1, R]: a normed latent and one rotated key a token.  `prefill` expands keys and values
of all heads for FlashAttentionScore; the others stay in the latent space, where PagedAttention takes its values
from the keys' first `mla_v_dim` columns.
"""

from __future__ import annotations

from typing import Any

from mindspore import nn, ops
from mindspore.ops.operations.nn_ops import FlashAttentionScore, PagedAttention, ReshapeAndCache

from ..parameters import parameter
from ..spec import Local


class RotateLatent(nn.Cell):
    def __init__(self, local: Local, rotation: int) -> None:
        super().__init__()
        mla = local.mla
        self.heads, self.dim = local.heads, local.config.head_dim
        self.nope, self.rope, self.kv_lora = mla.nope, mla.rope, mla.kv_lora
        self.rotate = ops.ApplyRotaryPosEmb(rotation)

    def construct(self, q: Any, kv: Any, step: Any) -> Any:
        q_nope, q_rope = ops.split(q.reshape(-1, self.heads, self.dim), (self.nope, self.rope), -1)
        latent, k_rope = ops.split(kv, (self.kv_lora, self.rope), -1)
        q_rope, k_rope = self.rotate(q_rope.reshape(-1, self.heads * self.rope), k_rope, step[0], step[1], step[4])
        return q_nope, q_rope.reshape(-1, self.heads, self.rope), latent, k_rope


class WriteLatent(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = ReshapeAndCache()

    def construct(self, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        written = self.write(ops.cat((latent, k_rope), -1), None, cache, None, step[2])
        return ops.depend(cache, written)


class _Attend(nn.Cell):
    def __init__(self, local: Local, prefix: str, dtype: Any) -> None:
        super().__init__()
        mla = local.mla
        self.heads, self.dim, self.latent, self.kv_lora = (
            local.heads,
            local.config.head_dim,
            mla.latent,
            mla.kv_lora,
        )
        self.nope, self.rope, self.v_dim = mla.nope, mla.rope, mla.v_dim
        shape = (local.heads * mla.nope, mla.kv_lora)
        self.to_key = parameter(prefix + "kv_b_proj_k.weight", shape, dtype)
        shape = (local.heads * mla.v_dim, mla.kv_lora)
        self.to_value = parameter(prefix + "kv_b_proj_v.weight", shape, dtype)


class AttendExpanded(_Attend):
    """No cached prefix.  The primitive wants one width for queries, keys and values: the narrower are filled up
    with columns that add nothing to the scores or are cut off the result."""

    def __init__(self, local: Local, prefix: str, dtype: Any) -> None:
        super().__init__(local, prefix, dtype)
        self.width = max(self.dim, self.v_dim)
        self.matmul = ops.MatMul(transpose_b=True)
        self.attend = FlashAttentionScore(
            head_num=local.heads,
            scale_value=local.config.softmax_scale,
            next_tokens=0,
            input_layout="TH",
        )

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        heads = self.heads
        latent = ops.depend(latent, cache)  # the cache is written even if only later steps read it
        shared = ops.tile(k_rope.reshape(-1, 1, self.rope), (1, heads, 1))
        q = ops.cat((q_nope, q_rope), -1)
        k = ops.cat((self.matmul(latent, self.to_key).reshape(-1, heads, self.nope), shared), -1)
        v = self.matmul(latent, self.to_value).reshape(-1, heads, self.v_dim)
        if self.v_dim < self.dim:
            v = ops.cat((v, k[:, :, self.v_dim :]), -1)
        elif self.v_dim > self.dim:
            nothing = ops.zeros_like(v[:, :, self.dim :])
            q, k = ops.cat((q, nothing), -1), ops.cat((k, nothing), -1)
        q, k, v = (x.reshape(-1, heads * self.width) for x in (q, k, v))
        out = self.attend(q, k, v, None, None, None, step[6], None, step[5], step[4])[3]
        return out.reshape(-1, heads, self.width)[:, :, : self.v_dim].reshape(-1, heads * self.v_dim)


class AttendAbsorbed(_Attend):
    """Queries go into the latent space; the cache is read as it is, whatever the number of new tokens."""

    def __init__(self, local: Local, prefix: str, dtype: Any) -> None:
        super().__init__(local, prefix, dtype)
        self.times = ops.BatchMatMul()
        self.times_turned = ops.BatchMatMul(transpose_b=True)
        self.attend = PagedAttention(
            head_num=local.heads,
            scale_value=local.config.softmax_scale,
            kv_head_num=1,
            mla_v_dim=self.kv_lora,
        )

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        heads = self.heads
        q = self.times(q_nope.transpose(1, 0, 2), self.to_key.reshape(heads, self.nope, self.kv_lora))
        q = ops.cat((q.transpose(1, 0, 2), q_rope), -1).reshape(-1, heads * self.latent)
        out = self.attend(q, cache, cache, step[3], step[4], None, None, step[6], step[5])
        out = out.reshape(-1, heads, self.kv_lora).transpose(1, 0, 2)
        out = self.times_turned(out, self.to_value.reshape(heads, self.v_dim, self.kv_lora))
        return out.transpose(1, 0, 2).reshape(-1, heads * self.v_dim)

"""Latent attention with Ascend's fused primitives, as sgl-mindspore's DeepSeek uses them.

The cache is [pages, page, 1, R]: a normed latent and one rotated key a token.  `prefill` expands keys and values
of all heads for FlashAttentionScore; the others stay in the latent space, where PagedAttention takes its values
from the keys' first `mla_v_dim` columns.
"""

from __future__ import annotations

from typing import Any

from mindspore import nn, ops
from mindspore.ops.operations.nn_ops import FlashAttentionScore, PagedAttention, ReshapeAndCache

from ...families.attention import Attention
from ..matrix import Matrix
from ..spec import Local
from .steps import AscendStep


def flash_attention(spec: Attention) -> Any:
    """The primitive for new sequences: ragged, layout TH."""
    return FlashAttentionScore(head_num=spec.heads, scale_value=spec.scale, next_tokens=0, input_layout="TH")


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
        q_rope = q_rope.reshape(-1, self.heads * self.rope)
        q_rope, k_rope = self.rotate(
            q_rope, k_rope, step[AscendStep.COS], step[AscendStep.SIN], step[AscendStep.CONTEXT_LENS]
        )
        return q_nope, q_rope.reshape(-1, self.heads, self.rope), latent, k_rope


class WriteLatent(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = ReshapeAndCache()

    def construct(self, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        written = self.write(ops.cat((latent, k_rope), -1), None, cache, None, step[AscendStep.SLOTS])
        return ops.depend(cache, written)


class _Attend(nn.Cell):
    """`matrices`: those that make keys and values of a latent."""

    def __init__(self, local: Local, spec: Attention, matrices: tuple[Matrix, Matrix]) -> None:
        super().__init__()
        mla = local.mla
        self.heads, self.dim, self.latent, self.kv_lora = spec.heads, spec.head_dim, mla.latent, mla.kv_lora
        self.nope, self.rope, self.v_dim = mla.nope, mla.rope, mla.v_dim
        self.to_key, self.to_value = matrices


class AttendExpanded(_Attend):
    """No cached prefix.  The primitive wants one width for queries, keys and values: the narrower are filled up
    with columns that add nothing to the scores or are cut off the result."""

    def __init__(self, local: Local, spec: Attention, matrices: tuple[Matrix, Matrix]) -> None:
        super().__init__(local, spec, matrices)
        self.width = max(self.dim, self.v_dim)
        self.attend = flash_attention(spec)

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        heads = self.heads
        latent = ops.depend(latent, cache)  # the cache is written even if only later steps read it
        shared = ops.tile(k_rope.reshape(-1, 1, self.rope), (1, heads, 1))
        q = ops.cat((q_nope, q_rope), -1)
        k = ops.cat((self.to_key(latent).reshape(-1, heads, self.nope), shared), -1)
        v = self.to_value(latent).reshape(-1, heads, self.v_dim)
        if self.v_dim < self.dim:
            v = ops.cat((v, k[:, :, self.v_dim :]), -1)
        elif self.v_dim > self.dim:
            nothing = ops.zeros_like(v[:, :, self.dim :])
            q, k = ops.cat((q, nothing), -1), ops.cat((k, nothing), -1)
        q, k, v = (x.reshape(-1, heads * self.width) for x in (q, k, v))
        out = self.attend(
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
        return out.reshape(-1, heads, self.width)[:, :, : self.v_dim].reshape(-1, heads * self.v_dim)


class AttendAbsorbed(_Attend):
    """Queries go into the latent space; the cache is read as it is, whatever the number of new tokens."""

    def __init__(self, local: Local, spec: Attention, matrices: tuple[Matrix, Matrix]) -> None:
        super().__init__(local, spec, matrices)
        self.times = ops.BatchMatMul()
        self.times_transposed = ops.BatchMatMul(transpose_b=True)
        self.times_transposed.set_prim_instance_name("times_turned")  # its name in files since the first
        self.attend = PagedAttention(
            head_num=spec.heads, scale_value=spec.scale, kv_head_num=1, mla_v_dim=self.kv_lora
        )

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        heads = self.heads
        to_key = self.to_key.values().reshape(heads, self.nope, self.kv_lora)
        q = self.times(q_nope.transpose(1, 0, 2), to_key)
        q = ops.cat((q.transpose(1, 0, 2), q_rope), -1).reshape(-1, heads * self.latent)
        lens = step[AscendStep.CONTEXT_LENS]
        out = self.attend(
            q,
            cache,
            cache,
            step[AscendStep.TABLES],
            lens,
            None,
            None,
            step[AscendStep.MASK],
            step[AscendStep.Q_LENS],
        )
        out = out.reshape(-1, heads, self.kv_lora).transpose(1, 0, 2)
        out = self.times_transposed(out, self.to_value.values().reshape(heads, self.v_dim, self.kv_lora))
        return out.transpose(1, 0, 2).reshape(-1, heads * self.v_dim)

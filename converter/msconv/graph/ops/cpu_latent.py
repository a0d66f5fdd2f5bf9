"""Latent attention on a CPU.  The cache is [pages, page, 1, R]: a normed latent and one rotated key a token."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import nn, ops

from ..parameters import parameter
from ..spec import Local


class RotateLatent(nn.Cell):
    """The heads' queries and the key they share are rotated together: fewer nodes."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        mla = local.mla
        self.heads, self.dim = local.heads, local.config.head_dim
        self.nope, self.rope, self.kv_lora = mla.nope, mla.rope, mla.kv_lora

    def construct(self, q: Any, kv: Any, step: Any) -> Any:
        q_nope, q_rope = ops.split(q.reshape(-1, self.heads, self.dim), (self.nope, self.rope), -1)
        latent, k_rope = ops.split(kv, (self.kv_lora, self.rope), -1)
        x = ops.cat((q_rope, k_rope.reshape(-1, 1, self.rope)), 1)
        first, second = ops.split(x, self.rope // 2, -1)
        x = x * step[0] + ops.cat((second, first), -1) * step[1]
        q_rope, k_rope = ops.split(x, (self.heads, 1), 1)
        return q_nope, q_rope, latent, k_rope


class WriteLatent(nn.Cell):
    """In place on the graph's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.update = ops.ScatterUpdate()

    def construct(self, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        rows = ops.cat((latent.expand_dims(1), k_rope), -1)
        return self.update(cache, step[2], rows.expand_dims(1))


class _Attend(nn.Cell):
    def __init__(self, local: Local, prefix: str) -> None:
        super().__init__()
        mla = local.mla
        self.heads, self.latent, self.kv_lora = local.heads, mla.latent, mla.kv_lora
        self.nope, self.rope, self.v_dim = mla.nope, mla.rope, mla.v_dim
        self.scale = local.config.softmax_scale
        shape = (local.heads * mla.nope, mla.kv_lora)
        self.to_key = parameter(prefix + "kv_b_proj_k.weight", shape, ms.float32)
        shape = (local.heads * mla.v_dim, mla.kv_lora)
        self.to_value = parameter(prefix + "kv_b_proj_v.weight", shape, ms.float32)
        self.times = ops.BatchMatMul()
        self.times_turned = ops.BatchMatMul(transpose_b=True)
        self.matmul = ops.MatMul(transpose_b=True)


class Absorbed(_Attend):
    """Queries go into the latent space, and the cache is read as it is."""

    def into_latents(self, q_nope: Any, q_rope: Any) -> Any:
        """Scaled queries [T, H, R]."""
        q = self.times((q_nope * self.scale).transpose(1, 0, 2), self.to_key.reshape(self.heads, self.nope, -1))
        return ops.cat((q.transpose(1, 0, 2), q_rope * self.scale), -1)

    def out_of_latents(self, mixed: Any) -> Any:
        """[T, H, R] -> [T, H*v_dim]."""
        mixed = mixed[:, :, : self.kv_lora].transpose(1, 0, 2)
        out = self.times_turned(mixed, self.to_value.reshape(self.heads, self.v_dim, -1))
        return out.transpose(1, 0, 2).reshape(-1, self.heads * self.v_dim)


class AttendAbsorbed(Absorbed):
    """One token a sequence."""

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        kv = ops.gather(cache, step[3], 0).reshape(ops.shape(q_nope)[0], -1, self.latent)
        shares = ops.softmax(self.times_turned(self.into_latents(q_nope, q_rope), kv) + step[4], -1)
        return self.out_of_latents(self.times(shares, kv))


class AttendExpanded(_Attend):
    """Ragged sequences as [B, H, L, S]: keys and values of all heads are made from the cached latents."""

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        _, _, _, tables, mask, queries, rows, back, _ = step
        heads = self.heads
        batch, _, width = ops.shape(queries)
        kv = ops.gather(cache, tables, 0).reshape(-1, self.latent)
        latents, rotated = ops.split(kv, (self.kv_lora, self.rope), -1)
        keys = ops.gather(self.matmul(latents, self.to_key).reshape(-1, self.nope), rows, 0)
        values = ops.gather(self.matmul(latents, self.to_value).reshape(-1, self.v_dim), rows, 0)
        size = ops.shape(keys)[2]
        plain = ops.gather((q_nope * self.scale).reshape(-1, self.nope), queries, 0)
        turned = ops.gather((q_rope * self.scale).reshape(-1, self.rope), queries, 0)
        turned = turned.reshape(batch, heads * width, self.rope)
        scores = self.times_turned(turned, rotated.reshape(batch, -1, self.rope))
        scores = self.times_turned(plain, keys) + scores.reshape(batch, heads, width, size) + mask
        mixed = self.times(ops.softmax(scores, -1), values)
        return ops.gather(mixed.reshape(-1, self.v_dim), back, 0).reshape(-1, heads * self.v_dim)

"""Latent attention on a CPU.  The cache is [pages, page, 1, R]: a normed latent and one rotated key a token."""

from __future__ import annotations

from typing import Any

from mindspore import nn, ops

from ...families.attention import Attention
from ..matrix import Matrix
from ..spec import Local
from .steps import DecodeStep, RaggedStep, Step


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
        x = x * step[Step.COS] + ops.cat((second, first), -1) * step[Step.SIN]
        q_rope, k_rope = ops.split(x, (self.heads, 1), 1)
        return q_nope, q_rope, latent, k_rope


class WriteLatent(nn.Cell):
    """In place on the graph's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.update = ops.ScatterUpdate()

    def construct(self, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        rows = ops.cat((latent.expand_dims(1), k_rope), -1)
        return self.update(cache, step[Step.SLOTS], rows.expand_dims(1))


class _Attend(nn.Cell):
    """`matrices`: those that make keys and values of a latent.  `mask`: index of the step's mask."""

    def __init__(self, local: Local, spec: Attention, matrices: tuple[Matrix, Matrix], mask: int = 0) -> None:
        super().__init__()
        mla = local.mla
        self.heads, self.latent, self.kv_lora = spec.heads, mla.latent, mla.kv_lora
        self.nope, self.rope, self.v_dim = mla.nope, mla.rope, mla.v_dim
        self.scale, self.mask = spec.scale, mask
        self.to_key, self.to_value = matrices
        self.times = ops.BatchMatMul()
        self.times_transposed = ops.BatchMatMul(transpose_b=True)
        self.times_transposed.set_prim_instance_name("times_turned")  # its name in files since the first


class Absorbed(_Attend):
    """Queries go into the latent space, and the cache is read as it is."""

    def into_latents(self, q_nope: Any, q_rope: Any) -> Any:
        """Scaled queries [T, H, R]."""
        to_key = self.to_key.values().reshape(self.heads, self.nope, -1)
        q = self.times((q_nope * self.scale).transpose(1, 0, 2), to_key)
        return ops.cat((q.transpose(1, 0, 2), q_rope * self.scale), -1)

    def out_of_latents(self, mixed: Any) -> Any:
        """[T, H, R] -> [T, H*v_dim]."""
        mixed = mixed[:, :, : self.kv_lora].transpose(1, 0, 2)
        out = self.times_transposed(mixed, self.to_value.values().reshape(self.heads, self.v_dim, -1))
        return out.transpose(1, 0, 2).reshape(-1, self.heads * self.v_dim)


class AttendAbsorbed(Absorbed):
    """One token a sequence."""

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        kv = ops.gather(cache, step[Step.TABLES], 0).reshape(ops.shape(q_nope)[0], -1, self.latent)
        scores = self.times_transposed(self.into_latents(q_nope, q_rope), kv)
        shares = ops.softmax(scores + step[DecodeStep.MASKS][self.mask], -1)
        return self.out_of_latents(self.times(shares, kv))


class AttendExpanded(_Attend):
    """Ragged sequences as [B, H, L, S]: keys and values of all heads are made from the cached latents."""

    def construct(self, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, cache: Any, step: Any) -> Any:
        heads = self.heads
        batch, _, width = ops.shape(step[RaggedStep.QUERIES])
        kv = ops.gather(cache, step[Step.TABLES], 0).reshape(-1, self.latent)
        latents, rotated = ops.split(kv, (self.kv_lora, self.rope), -1)
        keys = ops.gather(self.to_key(latents).reshape(-1, self.nope), step[RaggedStep.KEYS], 0)
        values = ops.gather(self.to_value(latents).reshape(-1, self.v_dim), step[RaggedStep.KEYS], 0)
        size = ops.shape(keys)[2]
        q_nope = ops.gather((q_nope * self.scale).reshape(-1, self.nope), step[RaggedStep.QUERIES], 0)
        q_rope = ops.gather((q_rope * self.scale).reshape(-1, self.rope), step[RaggedStep.QUERIES], 0)
        q_rope = q_rope.reshape(batch, heads * width, self.rope)
        scores = self.times_transposed(q_rope, rotated.reshape(batch, -1, self.rope))
        scores = self.times_transposed(q_nope, keys) + scores.reshape(batch, heads, width, size)
        mixed = self.times(ops.softmax(scores + step[RaggedStep.MASKS][self.mask], -1), values)
        return ops.gather(mixed.reshape(-1, self.v_dim), step[RaggedStep.BACK], 0).reshape(-1, heads * self.v_dim)

"""Attention on a CPU with keys and values for heads, and what the layers of a step share.

The cache is [slots, 1, K, D]: pages of one slot, because ScatterUpdate, which writes to the first dimension, is
the only kernel that does not copy the whole cache to return it.  It is read through the block table after the
step's rows are written, so a prompt whose beginning is already cached needs no case of its own.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ...families.attention import Attention
from ..parameters import parameter
from ..rope import frequencies
from ..spec import Local
from .steps import DecodeStep, RaggedStep, Step

HIDDEN_SCORE = -1e30  # finite: a row of padding must not become NaN


class Angles(nn.Cell):
    """positions [T] -> cos and sin (first half negated) for x*cos + swap(x)*sin, [T, D]."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        dim = local.config.rope_dim
        inv, factor = frequencies(local.config.rope, dim)
        self.inv = Tensor(np.concatenate([inv, inv]), ms.float32)
        sign = np.concatenate([-np.ones(dim // 2), np.ones(dim // 2)]) * factor
        self.sign = Tensor(sign.astype(np.float32))
        self.factor = factor

    def construct(self, positions: Any) -> Any:
        angle = ops.cast(positions, ms.float32).reshape(-1, 1) * self.inv
        return ops.cos(angle) * self.factor, ops.sin(angle) * self.sign


class Rotation(nn.Cell):
    """The same for all N heads that are rotated, a layer's queries and keys: [T, N, D]."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.angles = Angles(local)
        self.heads = local.heads + (1 if local.config.mla is not None else local.kv_heads)
        self.dim = local.config.rope_dim

    def construct(self, positions: Any) -> Any:
        cos, sin = self.angles(positions)
        shape = (ops.shape(positions)[0], self.heads, self.dim)
        return ops.broadcast_to(cos.expand_dims(1), shape), ops.broadcast_to(sin.expand_dims(1), shape)


class Mask(nn.Cell):
    """(last position seen [..., 1], slots S) -> [..., S]: 0 for the positions that are seen, else at most
    HIDDEN_SCORE.  With a window the last `window` of them are seen."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.has_window = window is not None
        self.oldest = 1 - window if window is not None else 0

    def construct(self, last: Any, size: Any) -> Any:
        shape = (*ops.shape(last)[:-1], size)
        position = ops.cast(ops.arange(0, size), ms.float32)  # exact up to 2**24
        beyond = ops.broadcast_to(position, shape) - ops.broadcast_to(ops.cast(last, ms.float32), shape)
        hidden = ops.relu(beyond)
        if self.has_window:
            hidden = hidden + ops.relu(self.oldest - beyond)
        return hidden * HIDDEN_SCORE


class BeginDecode(nn.Cell):
    """Gives a step as DecodeStep names it."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.rotation = Rotation(local)
        self.masks = nn.CellList([Mask(window) for window in local.windows])
        self.heads, self.kv_heads = local.heads, local.kv_heads
        self.rotated = local.heads + local.kv_heads
        head = np.arange(local.heads, dtype=np.int32)
        own = head // (local.heads // local.kv_heads)
        self.is_own = Tensor((own[:, None] == np.arange(local.kv_heads)).astype(np.int32)[None])
        self.head = Tensor(head.reshape(1, -1, 1))
        self.own = Tensor((head * local.kv_heads + own).reshape(1, -1))

    def construct(self, inputs: Any) -> Any:
        _, positions, slots, tables, context_lens, _ = inputs[:6]
        cos, sin = self.rotation(positions)
        batch, size = ops.shape(tables)
        last = (context_lens - 1).reshape(-1, 1, 1)
        last = ops.broadcast_to(last, (batch, self.heads, 1))
        masks: Any = ()
        for mask in self.masks:
            masks = (*masks, mask(last, size))
        sequence = ops.cast(ops.arange(0, batch), ms.int32).reshape(-1, 1, 1)
        zero = batch * self.rotated  # the row of zeros behind all others
        spread = (sequence * self.rotated + self.head - zero) * self.is_own + zero
        diagonal = sequence.reshape(-1, 1) * (self.heads * self.kv_heads) + self.own
        return cos, sin, slots, tables, masks, spread, diagonal


class BeginRagged(nn.Cell):
    """Gives a step as RaggedStep names it."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.rotation = Rotation(local)
        self.masks = nn.CellList([Mask(window) for window in local.windows])
        self.range = ops.Range()
        self.zero, self.one = Tensor(0, ms.int32), Tensor(1, ms.int32)
        self.longest = ops.ReduceMax()
        kv_heads = local.heads if local.config.mla is not None else local.kv_heads  # latents are expanded
        self.heads, self.kv_heads = local.heads, kv_heads
        self.rotated = local.heads + (0 if local.config.mla is not None else kv_heads)
        self.head = Tensor(np.arange(local.heads, dtype=np.int32).reshape(1, -1, 1))
        self.kv_head = Tensor(np.arange(kv_heads, dtype=np.int32).reshape(1, -1, 1))

    def construct(self, inputs: Any) -> Any:
        ids, positions, slots, tables, context_lens, q_lens = inputs[:6]
        cos, sin = self.rotation(positions)
        num_tokens = ops.shape(ids)[0]
        ends = ops.cast(ops.cumsum(q_lens, 0), ms.int32)
        starts = ends - q_lens
        # float32 is exact here, and ReduceMax has no int32 kernel on CPU
        longest = ops.cast(self.longest(ops.cast(q_lens, ms.float32)), ms.int32)
        column = self.range(self.zero, longest, self.one)
        width = ops.shape(column)[0]
        rows = ops.minimum(starts.reshape(-1, 1) + column.reshape(1, -1), num_tokens - 1)
        token = ops.cast(ops.arange(0, num_tokens), ms.int32)
        sequence = ops.cast(
            ops.sum(ops.cast(token.reshape(-1, 1) >= ends.reshape(1, -1), ms.float32), -1), ms.int32
        )
        batch, size = ops.shape(tables)
        queries = rows.expand_dims(1) * self.rotated + self.head
        key = ops.cast(ops.arange(0, batch * size), ms.int32).reshape(batch, 1, size)
        keys = key * self.kv_heads + self.kv_head
        first = sequence * self.heads
        inside = token - ops.gather(starts, sequence, 0)
        back = (first.reshape(-1, 1) + self.head.reshape(1, -1)) * width + inside.reshape(-1, 1)
        position = ((context_lens - q_lens).reshape(-1, 1) + column.reshape(1, -1)).expand_dims(1).expand_dims(-1)
        masks: Any = ()
        for mask in self.masks:
            masks = (*masks, ops.broadcast_to(mask(position, size), (batch, self.heads, width, size)))
        return cos, sin, slots, tables, masks, queries, keys, back, ends - 1


class SplitHeads(nn.Cell):
    """q and k are normed and rotated together, and stay together: [T, H+K, D], q scaled for the softmax.  k and v
    come as rows of the cache, [T, 1, K, D]."""

    def __init__(self, prefix: str, spec: Attention, eps: float) -> None:
        super().__init__()
        self.scale = spec.scale
        self.heads, self.kv_heads, self.dim = spec.heads, spec.kv_heads, spec.head_dim
        rotated, every = spec.heads + spec.kv_heads, np.arange(spec.heads + 2 * spec.kv_heads, dtype=np.int32)
        self.rotated = Tensor(every[:rotated])
        self.keys, self.values = Tensor(every[None, spec.heads : rotated]), Tensor(every[None, rotated:])
        self.has_norm = spec.qk_norm
        if spec.qk_norm:
            self.repeat = (1, 1, spec.head_dim)
            self.q_norm = parameter(prefix + "q_norm.weight", (spec.head_dim,), ms.float32)
            self.k_norm = parameter(prefix + "k_norm.weight", (spec.head_dim,), ms.float32)
            self.mean = ops.ReduceMean(keep_dims=True)
            self.eps = eps
        else:
            factors = np.array([spec.scale] * spec.heads + [1.0] * spec.kv_heads, np.float32)
            self.factors = Tensor(np.repeat(factors[:, None], spec.head_dim, 1))

    def construct(self, qkv: Any, step: Any) -> Any:
        qkv = qkv.reshape(-1, self.heads + 2 * self.kv_heads, self.dim)
        qk, v = ops.gather(qkv, self.rotated, 1), ops.gather(qkv, self.values, 1)
        if self.has_norm:
            weight = ops.cat(
                (
                    ops.broadcast_to(self.q_norm * self.scale, (self.heads, self.dim)),
                    ops.broadcast_to(self.k_norm, (self.kv_heads, self.dim)),
                ),
                0,
            )
            qk = qk * ops.tile(ops.rsqrt(self.mean(qk * qk, -1) + self.eps), self.repeat) * weight
        else:
            qk = qk * self.factors
        first, second = ops.split(qk, self.dim // 2, -1)
        qk = qk * step[Step.COS] + ops.cat((second, first), -1) * step[Step.SIN]
        return qk, ops.gather(qk, self.keys, 1), v


class WriteKv(nn.Cell):
    """In place on the graph's own inputs: a reshape between would write to a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.update = ops.ScatterUpdate()

    def construct(self, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        return self.update(k_cache, step[Step.SLOTS], k), self.update(v_cache, step[Step.SLOTS], v)


class AttendDecode(nn.Cell):
    """q on a block diagonal [B, H, K*D] against the gathered cache [B, S, K*D]: no transpose of the cache.  Keys
    times queries, transposed, took 0.8 to 0.95 of the time of queries times keys."""

    def __init__(self, spec: Attention, mask: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.mask = spec.heads, spec.kv_heads, spec.head_dim, mask
        self.zeros = Tensor(np.zeros((1, self.dim), np.float32))
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        batch, width = ops.shape(step[Step.TABLES])[0], self.kv_heads * self.dim
        keys = ops.gather(k_cache, step[Step.TABLES], 0).reshape(batch, -1, width)
        values = ops.gather(v_cache, step[Step.TABLES], 0).reshape(batch, -1, width)
        rows = ops.cat((q.reshape(-1, self.dim), self.zeros), 0)
        block_diagonal = ops.gather(rows, step[DecodeStep.SPREAD], 0).reshape(batch, self.heads, width)
        scores = ops.transpose(self.scores(keys, block_diagonal), (0, 2, 1))
        mixed = self.mix(ops.softmax(scores + step[DecodeStep.MASKS][self.mask], -1), values)
        return ops.gather(mixed.reshape(-1, self.dim), step[DecodeStep.DIAGONAL], 0).reshape(
            -1, self.heads * self.dim
        )


class AttendRagged(nn.Cell):
    """All sequences as one [B, K, group*L, S] problem; rows that pad a sequence are computed and dropped."""

    def __init__(self, spec: Attention, mask: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.mask = spec.heads, spec.kv_heads, spec.head_dim, mask
        self.group = spec.heads // spec.kv_heads
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        kv, dim = self.kv_heads, self.dim
        batch, _, width = ops.shape(step[RaggedStep.QUERIES])
        keys = ops.gather(ops.gather(k_cache, step[Step.TABLES], 0).reshape(-1, dim), step[RaggedStep.KEYS], 0)
        values = ops.gather(ops.gather(v_cache, step[Step.TABLES], 0).reshape(-1, dim), step[RaggedStep.KEYS], 0)
        spread = ops.gather(q.reshape(-1, dim), step[RaggedStep.QUERIES], 0)
        scores = self.scores(spread.reshape(batch, kv, self.group * width, dim), keys)
        size = ops.shape(keys)[2]
        shares = ops.softmax(
            scores.reshape(batch, self.heads, width, size) + step[RaggedStep.MASKS][self.mask], -1
        )
        mixed = self.mix(shares.reshape(batch, kv, self.group * width, size), values)
        return ops.gather(mixed.reshape(-1, dim), step[RaggedStep.BACK], 0).reshape(-1, self.heads * dim)

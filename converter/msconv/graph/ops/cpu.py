"""CPU operations: float32, base arithmetic only (MindSpore has no fused kernels on CPU).

The cache is [pages, page, K, D], read through the block table after the step's rows are written, so a prompt
whose beginning is already cached needs no case of its own.  Page size is the cache's own dimension.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ..parameters import parameter
from ..rope import frequencies
from ..spec import Local
from .base import Ops, collective
from .cpu_latent import AttendAbsorbed, AttendExpanded, RotateLatent, WriteLatent
from .cpu_moe import ExpertsGathered, ExpertsGrouped, RouteSigmoid, RouteSoftmax

HIDDEN_SCORE = -1e30  # finite: a row of padding must not become NaN


class CpuOps(Ops):
    dtype = ms.float32

    def begin(self) -> nn.Cell:
        return BeginDecode(self.local) if self.local.phase == "decode" else BeginPrefill(self.local)

    def norm(self, name: str, width: int, eps: float) -> nn.Cell:
        return Norm(name, width, eps)

    def add_norm(self, name: str, width: int) -> nn.Cell:
        return AddNorm(name, width, self.local.config.eps)

    def split_heads(self, prefix: str) -> nn.Cell:
        return SplitHeads(self.local, prefix)

    def write_kv(self) -> nn.Cell:
        return WriteKv()

    def attend(self) -> nn.Cell:
        return AttendDecode(self.local) if self.local.phase == "decode" else AttendPrefill(self.local)

    def rotate_latent(self) -> nn.Cell:
        return RotateLatent(self.local)

    def write_latent(self) -> nn.Cell:
        return WriteLatent()

    def attend_latent(self, prefix: str) -> nn.Cell:
        decode = self.local.phase == "decode"
        return AttendAbsorbed(self.local, prefix) if decode else AttendExpanded(self.local, prefix)

    def route(self, name: str) -> nn.Cell:
        softmax = self.local.moe.scoring == "softmax"
        return RouteSoftmax(self.local, name) if softmax else RouteSigmoid(self.local, name)

    def experts(self, prefix: str) -> nn.Cell:
        experts = ExpertsGathered if self.local.phase == "decode" else ExpertsGrouped
        return experts(self.local, prefix, self.expert_start)

    def last_tokens(self) -> nn.Cell:
        return LastTokens(self.local.phase == "decode")

    def gather_vocab(self) -> nn.Cell:
        return GatherVocab(self.local)


class Norm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(name, (width,), ms.float32)
        self.mean = ops.ReduceMean(keep_dims=True)
        self.eps = eps

    def construct(self, x: Any) -> Any:
        return x * ops.rsqrt(self.mean(x * x, -1) + self.eps) * self.weight


class AddNorm(nn.Cell):
    def __init__(self, name: str, width: int, eps: float) -> None:
        super().__init__()
        self.norm = Norm(name, width, eps)

    def construct(self, delta: Any, x: Any) -> Any:
        total = x + delta
        return self.norm(total), total


class Rotation(nn.Cell):
    """positions [T] -> cos [T, 1, D], sin [T, 1, D] (first half negated), for x*cos + swap(x)*sin."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        dim = local.config.rope_dim
        inv, factor = frequencies(local.config.rope, dim)
        self.inv = Tensor(np.concatenate([inv, inv]), ms.float32)
        sign = np.concatenate([-np.ones(dim // 2), np.ones(dim // 2)]) * factor
        self.sign = Tensor(sign.astype(np.float32))
        self.factor = factor

    def construct(self, positions: Any) -> Any:
        angle = ops.cast(positions, ms.float32).reshape(-1, 1, 1) * self.inv
        return ops.cos(angle) * self.factor, ops.sin(angle) * self.sign


class Places(nn.Cell):
    """slots [T] -> [T, 2]: page and offset."""

    def construct(self, slots: Any, cache: Any) -> Any:
        page = ops.shape(cache)[1]
        return ops.stack((slots // page, slots % page), -1)


class BeginDecode(nn.Cell):
    """One token a sequence: T = B.  step = cos, sin, places, table, mask [B, 1, S]."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.rotation = Rotation(local)
        self.places = Places()
        self.seen = Tensor(0.0, ms.float32)
        self.hidden = Tensor(HIDDEN_SCORE, ms.float32)

    def construct(self, inputs: Any) -> Any:
        _, positions, slots, tables, context_lens, _ = inputs[:6]
        cos, sin = self.rotation(positions)
        size = ops.shape(tables)[1] * ops.shape(inputs[6])[1]
        slot_position = ops.cast(ops.arange(0, size), ms.int32).reshape(1, 1, -1)
        mask = ops.select(slot_position < context_lens.reshape(-1, 1, 1), self.seen, self.hidden)
        return cos, sin, self.places(slots, inputs[6]), tables, mask


class BeginPrefill(nn.Cell):
    """Ragged sequences, laid out as [B, L] with L the longest.

    step = cos, sin, places, table, mask [B, 1, L, S], queries [B, H, L] (rows of [T*H, D]), keys [B, K, S] (rows
    of [B*S*K, D]), back [T, H] (rows of [B*H*L, D]), last [B].  Layouts change by gathering rows: a
    transpose keeps twice its result in memory until the graph has ended.
    """

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.rotation = Rotation(local)
        self.places = Places()
        self.seen = Tensor(0.0, ms.float32)
        self.hidden = Tensor(HIDDEN_SCORE, ms.float32)
        self.range = ops.Range()
        self.zero, self.one = Tensor(0, ms.int32), Tensor(1, ms.int32)
        self.longest = ops.ReduceMax()
        kv_heads = local.heads if local.config.mla is not None else local.kv_heads  # latents are expanded
        self.heads, self.kv_heads = local.heads, kv_heads
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
        size = ops.shape(tables)[1] * ops.shape(inputs[6])[1]
        batch = ops.shape(tables)[0]
        queries = rows.expand_dims(1) * self.heads + self.head
        key = ops.cast(ops.arange(0, batch * size), ms.int32).reshape(batch, 1, size)
        keys = key * self.kv_heads + self.kv_head
        first = sequence * self.heads
        inside = token - ops.gather(starts, sequence, 0)
        back = (first.reshape(-1, 1) + self.head.reshape(1, -1)) * width + inside.reshape(-1, 1)
        slot_position = ops.cast(ops.arange(0, size), ms.int32).reshape(1, 1, 1, -1)
        position = ((context_lens - q_lens).reshape(-1, 1) + column.reshape(1, -1)).expand_dims(1).expand_dims(-1)
        mask = ops.select(slot_position <= position, self.seen, self.hidden)
        return cos, sin, self.places(slots, inputs[6]), tables, mask, queries, keys, back, ends - 1


class SplitHeads(nn.Cell):
    """q and k are normed and rotated together: fewer nodes."""

    def __init__(self, local: Local, prefix: str) -> None:
        super().__init__()
        c = local.config
        self.heads, self.kv_heads, self.dim = local.heads, local.kv_heads, c.head_dim
        self.q_norm = parameter(prefix + "q_norm.weight", (c.head_dim,), ms.float32)
        self.k_norm = parameter(prefix + "k_norm.weight", (c.head_dim,), ms.float32)
        self.mean = ops.ReduceMean(keep_dims=True)
        self.eps = c.eps

    def construct(self, qkv: Any, step: Any) -> Any:
        rotated = self.heads + self.kv_heads
        qk, v = ops.split(qkv.reshape(-1, rotated + self.kv_heads, self.dim), (rotated, self.kv_heads), 1)
        weight = ops.cat(
            (
                ops.broadcast_to(self.q_norm, (self.heads, self.dim)),
                ops.broadcast_to(self.k_norm, (self.kv_heads, self.dim)),
            ),
            0,
        )
        qk = qk * ops.rsqrt(self.mean(qk * qk, -1) + self.eps) * weight
        first, second = ops.split(qk, self.dim // 2, -1)
        qk = qk * step[0] + ops.cat((second, first), -1) * step[1]
        q, k = ops.split(qk, (self.heads, self.kv_heads), 1)
        return q, k, v


class WriteKv(nn.Cell):
    """In place on the graph's own inputs: a reshape between would write to a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.update = ops.ScatterNdUpdate()

    def construct(self, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        return self.update(k_cache, step[2], k), self.update(v_cache, step[2], v)


class AttendDecode(nn.Cell):
    """q on a block diagonal [B, H, K*D] against the gathered cache [B, S, K*D]: no transpose of the cache."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = local.heads, local.kv_heads, local.config.head_dim
        self.group = local.heads // local.kv_heads
        self.scale = local.config.softmax_scale
        k = local.kv_heads
        self.diagonal = Tensor(np.eye(k, dtype=np.float32).reshape(1, k, 1, k, 1))
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        batch = ops.shape(q)[0]
        width = self.kv_heads * self.dim
        keys = ops.gather(k_cache, step[3], 0).reshape(batch, -1, width)
        values = ops.gather(v_cache, step[3], 0).reshape(batch, -1, width)
        spread = (q * self.scale).reshape(batch, self.kv_heads, self.group, 1, self.dim) * self.diagonal
        scores = self.scores(spread.reshape(batch, self.heads, width), keys) + step[4]
        mixed = self.mix(ops.softmax(scores, -1), values)
        mixed = mixed.reshape(batch, self.kv_heads, self.group, self.kv_heads, self.dim) * self.diagonal
        return ops.sum(mixed, 3).reshape(batch, self.heads * self.dim)


class AttendPrefill(nn.Cell):
    """All sequences as one [B, K, group*L, S] problem; rows that pad a sequence are computed and dropped."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = local.heads, local.kv_heads, local.config.head_dim
        self.group = local.heads // local.kv_heads
        self.scale = local.config.softmax_scale
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, step: Any) -> Any:
        _, _, _, tables, mask, queries, rows, back, _ = step
        kv, dim = self.kv_heads, self.dim
        batch, _, width = ops.shape(queries)
        keys = ops.gather(ops.gather(k_cache, tables, 0).reshape(-1, dim), rows, 0)
        values = ops.gather(ops.gather(v_cache, tables, 0).reshape(-1, dim), rows, 0)
        spread = ops.gather((q * self.scale).reshape(-1, dim), queries, 0)
        scores = self.scores(spread.reshape(batch, kv, self.group * width, dim), keys)
        size = ops.shape(keys)[2]
        shares = ops.softmax(scores.reshape(batch, self.heads, width, size) + mask, -1)
        mixed = self.mix(shares.reshape(batch, kv, self.group * width, size), values)
        return ops.gather(mixed.reshape(-1, dim), back, 0).reshape(-1, self.heads * dim)


class LastTokens(nn.Cell):
    def __init__(self, decode: bool) -> None:
        super().__init__()
        self.decode = decode

    def construct(self, h: Any, step: Any) -> Any:
        if self.decode:
            return h
        return ops.gather(h, step[8], 0)


class GatherVocab(nn.Cell):
    """Every rank puts its logits at its own place in a sum: MindSpore's CPU all-gather knows no sub-groups."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.tp, self.local_vocab, self.vocab = local.mesh.tp, local.vocab, local.config.vocab
        if self.tp > 1:
            self.onehot = parameter("rank_onehot", (self.tp, 1, 1), ms.float32)
            self.reduce = collective("AllReduce", op="sum")

    def construct(self, y: Any) -> Any:
        if self.tp == 1:
            return y
        y = self.reduce(y.expand_dims(0) * self.onehot)
        y = y.transpose(1, 0, 2).reshape(-1, self.tp * self.local_vocab)
        if self.tp * self.local_vocab > self.vocab:
            y = y[:, : self.vocab]
        return y

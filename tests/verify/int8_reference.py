"""A decoder of int8 matrices in float64 NumPy, all ranks one after the other: what graphs are held against.

Written from the models' papers and the arithmetic in msconv.quant.w8a8, not from what exports or interprets.
Its codes are led: where a quotient lies so near the middle of two codes that float32 may take either, it takes the
graph's.  What is further away counts as unexplained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv.families.config import DecoderConfig
from msconv.graph.rope import frequencies
from msconv.layout.cuts import Mesh

Array = NDArray[Any]
TIE = 2e-3  # of a code: so near the middle float32 may round the other way
LATENT_EPS = 1e-6


@dataclass
class Lead:
    """Codes that a graph made, by (rank, matrix): [T, K] of one sequence, of experts [T, k, K]."""

    codes: Mapping[tuple[int, str], Array]
    led: int = 0
    total: int = 0
    unexplained: list[str] = field(default_factory=list)
    used: set[tuple[int, str]] = field(default_factory=set)

    def __call__(self, rank: int, matrix: str, wanted: Array, at: Any = slice(None)) -> Array:
        """`wanted`: codes before rounding."""
        own, found = np.rint(wanted), self.codes[rank, matrix][at].astype(np.float64)
        self.used.add((rank, matrix))
        assert own.shape == found.shape, (matrix, own.shape, found.shape)
        away = own != found
        middle = np.abs(np.abs(wanted - np.trunc(wanted)) - 0.5) < TIE
        wrong = away & ~(middle & (np.abs(own - found) == 1))
        if wrong.any():
            self.unexplained.append(f"rank {rank} {matrix}: {int(wrong.sum())} of {wrong.size}")
        self.led, self.total = self.led + int(away.sum()), self.total + away.size
        return found


@dataclass
class Reference:
    """`weights[rank](name)`: what that rank's artifact stores, float64 or whole numbers, None if it has none."""

    config: DecoderConfig
    mesh: Mesh
    weights: list[Any]
    lead: Lead

    def product(self, rank: int, matrix: str, x: Array) -> Array:
        """x [T, K] times the matrix of that name, [O, K], in its format."""
        get, module = self.weights[rank], matrix.rpartition(".")[0]
        weight = get(matrix)
        if (scale := get(matrix + "_scale")) is not None:
            t = np.abs(x).max(-1, keepdims=True) / 127
            codes = self.lead(rank, matrix, x / np.where(t > 0, t, 1))
            return (codes @ weight.T) * scale.reshape(-1) * t
        if (deq := get(module + ".deq_scale")) is not None:
            wanted = x / get(module + ".input_scale") + get(module + ".input_offset")
            codes = self.lead(rank, matrix, np.clip(wanted, -128, 127))
            return (codes @ weight.T + get(module + ".quant_bias")) * deq
        return x @ weight.T

    def over_ranks(self, matrix: str, x: Any) -> Any:
        return [self.product(r, matrix, x if isinstance(x, np.ndarray) else x[r]) for r in self.mesh.ranks]

    def norm(self, name: str, x: Array, eps: float, rank: int = 0) -> Array:
        get = self.weights[rank]
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * get(name + ".weight")
        bias = get(name + ".bias")
        return y if bias is None else y + bias

    def logits(self, tokens: list[int]) -> Array:
        """[T, V] of one sequence."""
        c = self.config
        rows = -(-c.vocab // self.mesh.tp)
        embedded = [self.weights[t // rows]("model.embed_tokens.weight")[t % rows] for t in tokens]
        x = np.stack(embedded).astype(np.float64)
        for layer in range(c.layers):
            prefix = f"model.layers.{layer}."
            h = self.norm(prefix + "input_layernorm", x, c.eps)
            attend = self.heads if c.mla is None else self.latent
            x = x + attend(prefix + "self_attn.", layer, h)
            h = self.norm(prefix + "post_attention_layernorm", x, c.eps)
            x = x + (self.moe if c.has_experts(layer) else self.mlp)(prefix + "mlp.", h)
        h = self.norm("model.norm", x, c.eps)
        head = "model.embed_tokens.weight" if c.tied else "lm_head.weight"
        return np.concatenate([h @ self.weights[r](head).T for r in self.mesh.ranks], -1)[:, : c.vocab]

    def rotate(self, x: Array) -> Array:
        """x [T, H, D], one row a token."""
        inverse, factor = frequencies(self.config.rope, self.config.rope_dim)
        angle = (np.arange(len(x))[:, None] * inverse.astype(np.float64))[:, None]
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        first, second = np.split(x, 2, -1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """[T, H, D] each -> [T, H*D]."""
        scores = np.einsum("thd,shd->hts", q, k) * self.config.softmax_scale
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return np.einsum("hts,shd->thd", shares, v).reshape(len(q), -1)

    def heads(self, prefix: str, layer: int, h: Array) -> Array:
        spec = self.config.attention(layer).on_rank(self.mesh.tp)
        outputs = []
        for rank, qkv in enumerate(self.over_ranks(prefix + "qkv_proj.weight", h)):
            if spec.bias:
                qkv = qkv + self.weights[rank](prefix + "qkv_proj.bias")
            parts = qkv.reshape(len(h), -1, spec.head_dim)
            q, k, v = np.split(parts, [spec.heads, spec.heads + spec.kv_heads], 1)
            if spec.qk_norm:
                q = self.norm(prefix + "q_norm", q, self.config.eps)
                k = self.norm(prefix + "k_norm", k, self.config.eps)
            q, k = self.rotate(q), self.rotate(k)
            k, v = (np.repeat(a, spec.heads // spec.kv_heads, 1) for a in (k, v))
            outputs.append(self.attend(q, k, v))
        y = sum(self.over_ranks(prefix + "o_proj.weight", outputs))
        return y + self.weights[0](prefix + "o_proj.bias") if spec.output_bias else y

    def latent(self, prefix: str, layer: int, h: Array) -> Array:
        mla = self.config.mla
        assert mla is not None
        heads = self.config.heads // self.mesh.tp
        q: Any = h
        query = "q_proj.weight"
        if mla.q_lora:
            norms = enumerate(self.over_ranks(prefix + "q_a_proj.weight", h))
            q = [self.norm(prefix + "q_a_layernorm", a, LATENT_EPS, r) for r, a in norms]
            query = "q_b_proj.weight"
        queries = self.over_ranks(prefix + query, q)
        outputs = []
        for rank, kv in enumerate(self.over_ranks(prefix + "kv_a_proj_with_mqa.weight", h)):
            get = self.weights[rank]
            q_nope, q_rope = np.split(queries[rank].reshape(len(h), heads, -1), [mla.nope], -1)
            latent, k_rope = np.split(kv, [mla.kv_lora], -1)
            latent = self.norm(prefix + "kv_a_layernorm", latent, LATENT_EPS, rank)
            k_nope = (latent @ get(prefix + "kv_b_proj_k.weight").T).reshape(len(h), heads, -1)
            v = (latent @ get(prefix + "kv_b_proj_v.weight").T).reshape(len(h), heads, -1)
            shared = np.repeat(self.rotate(k_rope[:, None]), heads, 1)
            q_all = np.concatenate([q_nope, self.rotate(q_rope)], -1)
            outputs.append(self.attend(q_all, np.concatenate([k_nope, shared], -1), v))
        return np.asarray(sum(self.over_ranks(prefix + "o_proj.weight", outputs)))

    def mlp(self, prefix: str, h: Array) -> Array:
        within = [swiglu(y) for y in self.over_ranks(prefix + "gate_up_proj.weight", h)]
        return np.asarray(sum(self.over_ranks(prefix + "down_proj.weight", within)))

    def moe(self, prefix: str, h: Array) -> Array:
        moe = self.config.moe
        assert moe is not None
        weights, ids = self.route(prefix + "gate", h)
        out = np.zeros_like(h)
        local = moe.experts // self.mesh.ep
        for rank in self.mesh.ranks:
            first = self.mesh.ep_rank(rank) * local
            for token, slot in np.argwhere((ids >= first) & (ids < first + local)):
                expert = ids[token, slot] - first
                y = swiglu(
                    self.expert(rank, prefix + "experts.gate_up_proj.weight", expert, h[token], token, slot)
                )
                y = self.expert(rank, prefix + "experts.down_proj.weight", expert, y, token, slot)
                out[token] += weights[token, slot] * y
        return out + self.mlp(prefix + "shared_experts.", h) if moe.shared_ffn else out

    def expert(self, rank: int, matrix: str, expert: int, x: Array, token: int, slot: int) -> Array:
        get = self.weights[rank]
        t = np.abs(x).max() / 127
        codes = self.lead(rank, matrix, x / t, (token, slot))
        return (codes @ get(matrix)[expert]) * get(matrix + "_scale")[expert].reshape(-1) * t

    def route(self, name: str, h: Array) -> tuple[Array, Array]:
        moe = self.config.moe
        assert moe is not None
        logits = h @ self.weights[0](name + ".weight").T
        if moe.scoring == "softmax":
            scores = np.exp(logits - logits.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            choice = scores
        else:
            scores = 1 / (1 + np.exp(-logits))
            choice = scores + self.weights[0](name + ".e_score_correction_bias")
            grouped = choice.reshape(len(h), moe.groups, -1)
            best = np.sort(grouped, -1)[:, :, -2:].sum(-1)
            left = np.argsort(-best, -1)[:, moe.top_groups :]
            np.put_along_axis(grouped, left[:, :, None], -np.inf, 1)
            choice = grouped.reshape(len(h), -1)
        ids = np.argsort(-choice, -1, kind="stable")[:, : moe.top_k]
        weights = np.take_along_axis(scores, ids, -1)
        if moe.normalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights * moe.scale, ids


def swiglu(x: Array) -> Array:
    gate, up = np.split(x, 2, -1)
    return gate / (1 + np.exp(-gate)) * up

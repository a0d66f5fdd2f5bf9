"""Compiled kernels of CPU graphs, by what they promise: msconv_runtime/kernels/*.cc."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msconv_runtime.kernels import LIBRARY

from .int8 import dynamic_product, input_codes, row_codes, sums
from .table import Context, kernel

Attributes = dict[str, Any]
EXPECTED = {"func_type": "aot", "cpp_infer_shape": True, "cpp_infer_type": True, "primitive_target": "CPU"}


def compiled(
    name: str, codes: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        def checked(c: Context, a: Attributes, *inputs: Any) -> Any:
            if a != EXPECTED:
                raise ValueError(f"{name}: attributes {a}, not {EXPECTED}")
            return run(*inputs)

        kernel(f"{LIBRARY}:{name}", attributes=tuple(EXPECTED), codes=codes)(checked)
        return run

    return register


@compiled("Product")
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.float().T


@compiled("Rows")
def rows(table: Tensor, ids: Tensor) -> Tensor:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(table)):
        raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())} of {len(table)} rows")
    return table[ids.long()].float()


@compiled("Norm")
def norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@compiled("AddNorm")
def add_norm(delta: Tensor, x: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    total = x + delta
    return norm(total, weight, eps), total


@compiled("Swiglu")
def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@compiled("SplitHeads")
def split_heads(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, factors: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, dim = len(qkv), len(q_norm)
    parts = qkv.reshape(tokens, -1, dim)
    kv_heads = parts.shape[1] - len(factors)
    heads = len(factors) - kv_heads
    weights = torch.cat([q_norm.expand(heads, dim), k_norm.expand(kv_heads, dim)])
    x = norm(parts[:, : len(factors)], weights, eps) * factors[:, None]
    first, second = x.chunk(2, -1)
    x = x * cos[:, None] + torch.cat([second, first], -1) * sin[:, None]
    return x[:, :heads], x[:, None, heads:], parts[:, None, len(factors) :]


@compiled("Attend")
def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, contexts: Tensor, counts: Tensor
) -> Tensor:
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    if heads % kv_heads or int(counts.sum()) != len(q) or bool((contexts < counts).any()):
        raise ValueError(f"{heads} heads, {kv_heads} of keys; {counts.tolist()} of {contexts.tolist()} tokens")
    out, first = torch.empty_like(q), 0
    for table, context, count in zip(tables, contexts.tolist(), counts.tolist(), strict=True):
        slots = table[:context].long()
        k = k_cache[slots, 0].repeat_interleave(heads // kv_heads, 1)
        v = v_cache[slots, 0].repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("thd,shd->hts", q[first : first + count], k)
        beyond = torch.ones(count, context, dtype=torch.bool).triu(context - count + 1)
        shares = scores.masked_fill(beyond, float("-inf")).softmax(-1)
        out[first : first + count] = torch.einsum("hts,shd->thd", shares, v)
        first += count
    return out.reshape(len(q), -1)


@compiled("Mlp")
def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return product(swiglu(product(x, gate_up)), down)


@compiled("Attention")
def attention(h: Tensor, qkv: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    """Writes this step's keys and values to the caches, in place.  `rest`: as of `mixed_heads`, then o."""
    *others, o = rest
    return product(mixed_heads(product(h, qkv) + bias, *others), o)


def mixed_heads(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    factors: Tensor,
    eps: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    tables: Tensor,
    contexts: Tensor,
    counts: Tensor,
) -> Tensor:
    """[T, H*D]; writes keys and values."""
    q, k, v = split_heads(qkv, q_norm, k_norm, cos, sin, factors, eps)
    place = slots.long()
    if place.numel() and (int(place.min()) < 0 or int(place.max()) >= len(k_cache)):
        raise IndexError(f"slots from {int(place.min())} to {int(place.max())} of {len(k_cache)}")
    k_cache[place], v_cache[place] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    return attend(q, k_cache, v_cache, tables, contexts, counts)


@compiled("Layer")
def layer(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    *of_attention, x, weight, gate_up, down, next_weight = inputs
    eps = of_attention[8]
    h, total = add_norm(attention(*of_attention), x, weight, eps)
    return add_norm(mlp(h, gate_up, down), total, next_weight, eps)


@compiled("Experts")
def experts(h: Tensor, weights: Tensor, ids: Tensor, start: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for expert in range(len(gate_up)):
        tokens, places = (ids == expert + int(start)).nonzero(as_tuple=True)
        if len(tokens):
            y = swiglu(h[tokens] @ gate_up[expert].float()) @ down[expert].float()
            out.index_add_(0, tokens, y * weights[tokens, places, None])
    return out


def _rows(x: Tensor, *rest: Any) -> list[tuple[int, Tensor, Tensor | None]]:
    return [(1, row_codes(x)[0], None)]


def _inputs(x: Tensor, weight: Any, deq_scale: Any, bias: Any, scale: Tensor, offset: Tensor) -> list[Any]:
    return [(1, input_codes(x, 1 / scale, offset), None)]


def _expert(x: Tensor, expert: int, gate_up: Tensor, scales: Tensor) -> Tensor:
    """What goes into an expert's second product: [n, ffn]."""
    return swiglu(dynamic_product(x, gate_up[expert], scales[expert].reshape(-1)))


def _experts(h: Tensor, weights: Tensor, ids: Tensor, start: Tensor, *matrices: Tensor) -> list[Any]:
    gate_up, scales, down, _ = matrices
    tokens, count = ids.shape
    within = torch.zeros(tokens, count, down.shape[1], dtype=torch.int8)
    for expert in range(len(gate_up)):
        chosen = (ids == expert + int(start)).nonzero(as_tuple=True)
        if len(chosen[0]):
            within[chosen] = row_codes(_expert(h[chosen[0]], expert, gate_up, scales))[0]
    return [(4, row_codes(h)[0][:, None].expand(-1, count, -1), ids), (6, within, ids)]


@compiled("ProductInt8", _rows)
def product_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return dynamic_product(x, weight.T, scale.reshape(-1))


@compiled("ProductInt8Static", _inputs)
def product_int8_static(
    x: Tensor, weight: Tensor, deq_scale: Tensor, bias: Tensor, scale: Tensor, offset: Tensor
) -> Tensor:
    return (sums(input_codes(x, 1 / scale, offset), weight.T) + bias).float() * deq_scale


def _within(x: Tensor, gate_up: Tensor, scale: Tensor) -> Tensor:
    """What goes into the second product: [T, ffn]."""
    return swiglu(dynamic_product(x, gate_up.T, scale.reshape(-1)))


def _mlp(x: Tensor, gate_up: Tensor, scale: Tensor, *rest: Any) -> list[tuple[int, Tensor, Tensor | None]]:
    return [(1, row_codes(x)[0], None), (3, row_codes(_within(x, gate_up, scale))[0], None)]


@compiled("MlpInt8", _mlp)
def mlp_int8(x: Tensor, gate_up: Tensor, scale: Tensor, down: Tensor, down_scale: Tensor) -> Tensor:
    return dynamic_product(_within(x, gate_up, scale), down.T, down_scale.reshape(-1))


@compiled("HeadsInt8", _rows)
def heads_int8(h: Tensor, qkv: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return split_heads(dynamic_product(h, qkv.T, scale.reshape(-1)), *rest)


def _normed(mixed: Tensor, *rest: Tensor) -> Any:
    """What goes into the MLP, and the sum that it is the norm of: [T, width] each."""
    x, o, scale, weight, *_, eps = rest
    return add_norm(dynamic_product(mixed, o.T, scale.reshape(-1)), x, weight, eps)


def _behind(mixed: Tensor, *rest: Tensor) -> list[tuple[int, Tensor, Tensor | None]]:
    gate_up, scale, *_ = rest[4:]
    h, _ = _normed(mixed, *rest)
    within = _within(h, gate_up, scale)
    return [(2, row_codes(mixed)[0], None), (5, row_codes(h)[0], None), (7, row_codes(within)[0], None)]


@compiled("AfterAttentionInt8", _behind)
def after_attention_int8(mixed: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    *matrices, next_weight, eps = rest[4:]
    h, total = _normed(mixed, *rest)
    return add_norm(mlp_int8(h, *matrices), total, next_weight, eps)


def _mixed(h: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    """What goes into the output projection: [T, H*D].  `rest`: what follows, up to it."""
    return mixed_heads(dynamic_product(h, qkv.T, scale.reshape(-1)) + bias, *rest)


def _half(h: Tensor, *rest: Tensor) -> list[tuple[int, Tensor, Tensor | None]]:
    return [(1, row_codes(h)[0], None), (16, row_codes(_mixed(h, *rest[:15]))[0], None)]


@compiled("AttentionInt8", _half)
def attention_int8(h: Tensor, *rest: Tensor) -> Tensor:
    *before, o, o_scale = rest
    return dynamic_product(_mixed(h, *before), o.T, o_scale.reshape(-1))


def _whole(h: Tensor, *rest: Tensor) -> list[tuple[int, Tensor, Tensor | None]]:
    eps, o, o_scale, x, weight, gate_up, scale = rest[8], *rest[15:21]
    mixed = _mixed(h, *rest[:15])
    normed, _ = add_norm(dynamic_product(mixed, o.T, o_scale.reshape(-1)), x, weight, eps)
    found = [(1, h), (16, mixed), (20, normed), (22, _within(normed, gate_up, scale))]
    return [(at, row_codes(value)[0], None) for at, value in found]


@compiled("LayerInt8", _whole)
def layer_int8(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    *of_attention, x, weight, gate_up, scale, down, down_scale, next_weight = inputs
    eps = of_attention[9]
    h, total = add_norm(attention_int8(*of_attention), x, weight, eps)
    return add_norm(mlp_int8(h, gate_up, scale, down, down_scale), total, next_weight, eps)


@compiled("ExpertsInt8", _experts)
def experts_int8(h: Tensor, weights: Tensor, ids: Tensor, start: Tensor, *matrices: Tensor) -> Tensor:
    gate_up, scales, down, down_scales = matrices
    out = torch.zeros_like(h)
    for expert in range(len(gate_up)):
        tokens, places = (ids == expert + int(start)).nonzero(as_tuple=True)
        if len(tokens):
            within = _expert(h[tokens], expert, gate_up, scales)
            y = dynamic_product(within, down[expert], down_scales[expert].reshape(-1))
            out.index_add_(0, tokens, y * weights[tokens, places, None])
    return out

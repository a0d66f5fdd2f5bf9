"""Ascend's fused primitives, as SGLang's and vLLM's MindSpore models use them.

The contracts are from mindspore.ops' documentation and from the callers sgl-mindspore and vllm-mindspore; where
they leave something open, each reading taken here is written down.  Only a device can show that its kernels
agree.
"""

from __future__ import annotations

from typing import Any

import torch

from .table import Context, kernel, upcast

Attributes = dict[str, Any]
TILE = 128  # the mask of FlashAttentionScore in layout TH is one tile of this size
MASKED = -10000.0  # what a mask value of 1.0 adds in bfloat16; float16 masks hold it themselves
EVERYTHING = 2**31 - 1  # pre_tokens: no window
TH = 5  # layout's number in the MindIR


@kernel("RmsNorm")
def rms_norm(c: Context, a: Attributes, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    """(x / sqrt(mean(x^2) + eps) * weight, 1/sqrt).  In float32, rounded once."""
    f = x.float()
    scale = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return (f * scale * weight.float()).to(x.dtype), scale


@kernel("AddRmsNorm")
def add_rms_norm(c: Context, a: Attributes, x: torch.Tensor, y: torch.Tensor, weight: Any, eps: float) -> Any:
    """(norm(x + y), 1/sqrt, x + y): the sum is rounded before it is normed."""
    total = (x.float() + y.float()).to(x.dtype)
    normed, scale = rms_norm(c, a, total, weight, eps)
    return normed, scale, total


@kernel("Swiglu")
def swiglu(c: Context, a: Attributes, x: torch.Tensor, dim: int) -> torch.Tensor:
    """silu(first half) * second half of the last dimension, as mindspore.ops.swiglu and CANN's aclnnSwiGlu say.
    Their kernel for bfloat16 (cann-ops, swi_glu_bf16.hpp) computes in float32 and rounds once, half to even: silu
    is not rounded before the product, where SiLU and Mul round each."""
    if int(dim) not in (-1, x.dim() - 1) or x.shape[-1] % 2:
        raise ValueError(f"Swiglu: dim {dim} of {tuple(x.shape)} is not known here")
    gate, up = upcast(x).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


@kernel("ApplyRotaryPosEmb")
def apply_rotary(
    c: Context, a: Attributes, q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, lens: Any, form: int
) -> Any:
    """x*cos + (-x2, x1)*sin per head of [T, n*D], cos and sin [T, D]: one row a token, whatever its sequence.

    form 2 is half rotation.  The primitive also takes whole tables whose rows restart at each sequence; our
    graphs give gathered rows, as sgl-mindspore does in decode.  Several sequences with gathered rows in prefill
    are to be confirmed on a device.
    """
    if int(form) != 2:
        raise ValueError(f"ApplyRotaryPosEmb: cos_format {form} is not known here")
    tokens, dim = q.shape[0], cos.shape[-1]
    if cos.shape[0] != tokens:
        raise ValueError(f"ApplyRotaryPosEmb: {cos.shape[0]} rows of cos for {tokens} tokens")

    def rotate(x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(tokens, -1, dim).float()
        first, second = heads.chunk(2, -1)
        swapped = torch.cat((-second, first), -1)
        out = heads * cos[:, None].float() + swapped * sin[:, None].float()
        return out.reshape(tokens, -1).to(x.dtype)

    return rotate(q), rotate(k)


@kernel("ReshapeAndCache")
def reshape_and_cache(
    c: Context,
    a: dict[str, Any],
    k: torch.Tensor,
    v: Any,
    k_cache: torch.Tensor,
    v_cache: Any,
    slots: Any,
    *m: Any,
) -> torch.Tensor:
    """Row i of k and v goes to slot slots[i] = page*page_size + offset of [pages, page, K, D], in place.
    A negative slot writes nothing."""
    wanted = slots >= 0
    places = slots[wanted].long()
    for rows, cache in ((k, k_cache), (v, v_cache)):
        if rows is None:
            continue
        flat = cache.view(-1, cache.shape[2] * cache.shape[3])
        if places.numel() and int(places.max()) >= len(flat):
            raise IndexError(f"ReshapeAndCache: slot {int(places.max())} of {len(flat)}")
        flat[places] = rows.reshape(len(rows), -1)[wanted].to(cache.dtype)
    return k


@kernel("FlashAttentionScore")
def flash_attention(c: Context, a: Attributes, *inputs: Any) -> Any:
    """Ragged self-attention in layout TH: q [T, H*D], k and v [T, K*D], lengths per sequence, not cumulative.

    The mask is one 128x128 tile.  With next_tokens 0, tiles above the diagonal are not computed, tiles below it
    are wholly visible, and tiles on it take the mask: in bfloat16 its values times -10000 are added to the
    scores, in float16 its values themselves (SGLang's LowerTriangularMask).  Result: item 3 of 4, [T, H*D].
    """
    q, k, v, shift, drop, pad, mask, prefix, q_lens, kv_lens = inputs[:10]
    heads, keep, scale, before, after, inner, layout, sparse = inputs[10:18]
    if any(x is not None for x in (shift, drop, pad, prefix)) or keep != 1.0 or layout != TH:
        raise ValueError("FlashAttentionScore: only layout TH with a mask and lengths is known here")
    if before != EVERYTHING or tuple(mask.shape) != (TILE, TILE):
        raise ValueError(f"FlashAttentionScore: pre_tokens {before}, mask {tuple(mask.shape)}")
    if after != 0 or inner != 0 or sparse != 0:
        raise ValueError(f"FlashAttentionScore: next_tokens {after}, inner_precise {inner}, sparse_mode {sparse}")
    heads = int(heads)
    dim = q.shape[-1] // heads
    shared = heads // (k.shape[-1] // dim)
    added = mask.float() * (MASKED if c.dtype == torch.bfloat16 else 1.0)
    out, q_end, k_end = [], 0, 0
    for nq, nk in zip(_lengths(q_lens), _lengths(kv_lens), strict=True):
        if nq != nk:
            raise ValueError(f"FlashAttentionScore: {nq} queries for {nk} keys: this phase has no cached prefix")
        rows = torch.arange(nq)
        tile_q, tile_k = rows[:, None] // TILE, rows[None, :] // TILE
        bias = added[rows[:, None] % TILE, rows[None, :] % TILE]
        bias = torch.where(tile_q == tile_k, bias, torch.zeros(()))
        bias = bias.masked_fill(tile_k > tile_q, float("-inf"))
        query = q[q_end : q_end + nq].reshape(nq, heads, dim)
        key = k[k_end : k_end + nk].reshape(nk, -1, dim)
        value = v[k_end : k_end + nk].reshape(nk, -1, dim)
        out.append(_attend(query, key, value, shared, float(scale), bias))
        q_end, k_end = q_end + nq, k_end + nk
    if q_end != len(q) or k_end != len(k):
        raise ValueError(f"FlashAttentionScore: lengths sum to {q_end} and {k_end} of {len(q)} tokens")
    return None, None, None, torch.cat(out).to(q.dtype)


@kernel("PagedAttention")
def paged_attention(c: Context, a: Attributes, *inputs: Any) -> torch.Tensor:
    """Attention over the cache: q [T, H*D], context_lens (new tokens counted) and q_lens per sequence.

    Keys are those before context_len, through the block table; with mla_v_dim values are their first columns.
    The mask is added to the scores: one value for all if it is (1, 1), else row t for token t, from column 0 of
    its sequence on.  Nothing else hides a key: a mask of zeros lets a token see those after it.
    """
    q, k_cache, v_cache, tables, context_lens, k_scale, v_scale, mask, q_lens = inputs[:9]
    alibi, heads, scale, kv_heads, quant, mask_mode, mla_dim = inputs[9:16]
    if any(x is not None for x in (k_scale, v_scale, alibi)) or int(quant) != 0 or int(mask_mode) != 0:
        raise ValueError("PagedAttention: scales, alibi and modes are not known here")
    heads, kv_heads, mla_dim = int(heads), int(kv_heads), int(mla_dim)
    page, dim = k_cache.shape[1], k_cache.shape[3]
    if not 0 <= mla_dim <= dim:
        raise ValueError(f"PagedAttention: mla_v_dim {mla_dim} of keys that are {dim} wide")
    out, end = [], 0
    for b, (context, nq) in enumerate(zip(_lengths(context_lens), _lengths(q_lens), strict=True)):
        pages = tables[b][: -(-context // page)].long()
        if pages.numel() and int(pages.max()) >= len(k_cache):
            raise IndexError(f"PagedAttention: page {int(pages.max())} of {len(k_cache)}")
        key = k_cache[pages].reshape(-1, kv_heads, dim)[:context]
        value = key[..., :mla_dim] if mla_dim else v_cache[pages].reshape(-1, kv_heads, v_cache.shape[3])[:context]
        rows = mask if tuple(mask.shape) == (1, 1) else mask[end : end + nq, :context]
        query = q[end : end + nq].reshape(nq, heads, dim)
        out.append(_attend(query, key, value, heads // kv_heads, float(scale), rows.float()))
        end += nq
    if end != len(q):
        raise ValueError(f"PagedAttention: lengths sum to {end} of {len(q)} tokens")
    return torch.cat(out).to(q.dtype)


def _attend(query: Any, key: Any, value: Any, shared: int, scale: float, bias: Any) -> torch.Tensor:
    """[q, H, D], [k, K, D], [k, K, D] -> [q, H*D]; `shared` query heads take one key head."""
    q, k, v = (upcast(x).transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    shares = torch.softmax(q @ k.mT * scale + bias, -1)
    return (shares @ v).transpose(0, 1).reshape(len(query), -1)


def _lengths(x: Any) -> list[int]:
    return [int(n) for n in (x.tolist() if isinstance(x, torch.Tensor) else x)]

"""Ascend's primitives for int8, and the arithmetic of W8A8 that all targets share.

The contracts are from CANN's documentation (8.2 to 8.5) of aclnnDynamicQuant, aclnnAscendQuant and
aclnnQuantMatmulV4.  Products of codes are whole numbers, and exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .plain import TYPE_IDS
from .table import Context, kernel

Attributes = dict[str, Any]
LARGEST = 127  # code of a row's largest value
PIECE = 1024  # 1024 * 128 * 128 = 2**24: up to there float32 holds every whole number
ROUND = 0  # the mode "ROUND" in a MindIR: half to even


def row_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., K] -> its codes int8 and a scale for each row [..], float32.  A row of zeros has scale 0."""
    x = x.float()
    scale = x.abs().amax(-1) / LARGEST
    divisor = torch.where(scale > 0, scale, torch.ones(()))
    return (x / divisor[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def input_codes(x: Tensor, reciprocal: Tensor, offset: Tensor) -> Tensor:
    """x -> its codes int8, with one scale and offset for all rows, or for each column."""
    return (x.float() * reciprocal.float() + offset.float()).round().clamp(-128, 127).to(torch.int8)


def sums(codes: Tensor, weight: Tensor) -> Tensor:
    """int8 [T, K] by int8 [K, M] -> int64 [T, M], exact."""
    if codes.dtype != torch.int8 or weight.dtype != torch.int8:
        raise TypeError(f"a product of {codes.dtype} by {weight.dtype}, not of int8 by int8")
    total = torch.zeros(len(codes), weight.shape[1], dtype=torch.int64)
    for k in range(0, weight.shape[0], PIECE):
        total += (codes[:, k : k + PIECE].float() @ weight[k : k + PIECE].float()).long()
    return total


def dynamic_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, K] by codes [K, M] with scales [M] -> float32 [T, M]."""
    codes, token_scales = row_codes(x)
    return sums(codes, weight).float() * scale.float() * token_scales[:, None]


def as_float(scale: Tensor) -> Tensor:
    """float32 scales of a float16 product come as their bits, in int64."""
    if scale.dtype != torch.int64:
        return scale.float()
    if bool(((scale < 0) | (scale >> 32 != 0)).any()):
        raise ValueError("scales of int64 that are no bits of float32")
    return scale.to(torch.int32).view(torch.float32)


@kernel("DynamicQuantExt")
def dynamic_quant(c: Context, a: Attributes, x: Tensor, smooth: Any) -> tuple[Tensor, Tensor]:
    """Codes of each row, and its scale: max|row| / 127 in float32."""
    if smooth is not None:
        raise ValueError("DynamicQuantExt: smooth scales are not known here")
    return row_codes(x)


@kernel("QuantV2")
def quant(
    c: Context, a: Attributes, x: Tensor, scale: Tensor, offset: Tensor, root: Any, mode: Any, dtype: Any
) -> Tensor:
    """Codes of x * scale + offset: `scale` is the reciprocal of what codes are multiplied by."""
    if root or int(mode) != ROUND or TYPE_IDS[int(dtype)] != torch.int8:
        raise ValueError(f"QuantV2: sqrt_mode {root}, round_mode {mode}, type {dtype} are not known here")
    return input_codes(x, scale, offset)


@kernel("QuantBatchMatmul")
def quant_batch_matmul(c: Context, a: Attributes, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """(x @ weight.T + int32 bias) * scale, times each row's scale if there is one, rounded once."""
    scale, offset, bias, token_scales, turn_x, turn_weight, dtype = rest
    if offset is not None or turn_x or not turn_weight:
        raise ValueError("QuantBatchMatmul: only x by a transposed weight, without an offset, is known here")
    if (bias is not None and bias.dtype != torch.int32) or tuple(scale.shape) != (len(weight),):
        raise TypeError(f"QuantBatchMatmul: scales {tuple(scale.shape)}, bias {getattr(bias, 'dtype', None)}")
    total = sums(x, weight.T)
    if bias is not None:
        total += bias
    y = total.float() * as_float(scale)
    if token_scales is not None:
        y = y * token_scales.float()[:, None]
    return y.to(c.keep(TYPE_IDS[int(dtype)]))

"""Rotary frequencies: default, linear and yarn (arXiv:2309.00071), as transformers 5 computes them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..families.config import Rope


def frequencies(rope: Rope, dim: int) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies [dim/2] float32, and the factor on cos and sin."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    unscaled = (np.float32(1.0) / base).astype(np.float32)
    if rope.kind == "linear":
        return unscaled / np.float32(rope.factor), 1.0
    if rope.kind == "yarn":
        scaled = (np.float32(1.0) / (np.float32(rope.factor) * base)).astype(np.float32)
        keep = np.float32(1.0) - _ramp(rope, dim)
        return (scaled * (1 - keep) + unscaled * keep).astype(np.float32), attention_factor(rope)
    return unscaled, 1.0


def attention_factor(rope: Rope) -> float:
    """Yarn's factor on cos and sin: given, or 0.1 ln(factor) + 1, or DeepSeek's ratio of two mscales."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor, 1.0)


def mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _ramp(rope: Rope, dim: int) -> NDArray[np.float32]:
    """0 where a frequency is kept, 1 where it is interpolated, linear between the two corrections."""

    def correction(rotations: float) -> float:
        wavelength = rope.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, 0, 1).astype(np.float32)

"""The arithmetic of W8A8, written a second time: torch, whole numbers exact, quotients in float64.

The converter's own is in quant/w8a8.py and the graphs'; nothing here reads either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 127.0
LOWEST, HIGHEST = -128.0, 127.0
SMALLEST_SCALE = 2.0**-126
EXACT_COLUMNS = 1024  # 128 * 128 * 1024 = 2**24: float32 adds up that many products of codes without rounding


@dataclass(frozen=True)
class Quotients:
    """What rounds to codes, float64 [N, K].  `scale`: float64 [N, 1] of each row, or [1, 1] of all."""

    exact: torch.Tensor
    scale: torch.Tensor

    @property
    def codes(self) -> torch.Tensor:
        """Rounded half to even, int8."""
        return self.exact.round().clamp(LOWEST, HIGHEST).to(torch.int8)


def quantise_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [O, K] float32 -> codes int8 [O, K], and scales [O, 1] float32 that bfloat16 can hold."""
    scale = (values.abs().amax(1, keepdim=True) / LARGEST).to(torch.bfloat16).to(torch.float32)
    scale = scale.clamp(min=SMALLEST_SCALE)
    return (values / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def by_token(x: torch.Tensor) -> Quotients:
    """Each row with a scale of its own, in float32 as accelerators have it.  A row of zeros has codes 0."""
    scale = x.float().abs().amax(-1, keepdim=True) / LARGEST
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Quotients(x.double() / divisor.double(), scale.double())


def by_input(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> Quotients:
    """All rows with one scale and offset, [1] each."""
    exact = x.double() / scale.double() + offset.double()
    return Quotients(exact.clamp(LOWEST, HIGHEST), scale.double().reshape(1, 1))


def product(codes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] by int8 [O, K], exact -> float64 [N, O]."""
    total = torch.zeros((len(codes), len(matrix)), dtype=torch.float64)
    for begin in range(0, codes.shape[1], EXACT_COLUMNS):
        columns = slice(begin, begin + EXACT_COLUMNS)
        total += codes[:, columns].float() @ matrix[:, columns].float().T
    return total

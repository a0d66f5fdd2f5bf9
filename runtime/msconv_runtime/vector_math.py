"""torch's elementwise functions, which must be exact from their first call on.

torch hands exp, sin, cos, sqrt and their like to MKL, whose vector functions choose their code at their first
call.  MKL 2024.2, which torch 2.13's wheels contain, does so without a lock: where two threads make that first
call, one of them may run code of low accuracy, for that one call (pytorch issue 188792).  On one machine cos was
wrong by 1.5e-4 in 4 of 22,000 fresh processes: as a reference's rotary angles, logits that are wrong by 1e-3.
"""

from __future__ import annotations

from functools import cache

# What torch 2.13's ATen/cpu/vml.h hands to MKL.
FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan"),
    *("tanh", "trunc"),
)


@cache
def choose_code() -> None:
    """Call each function once for one element: one thread makes the choice.  Some milliseconds; once a process,
    before torch computes anything."""
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(one)

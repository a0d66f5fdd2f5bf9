"""What only a CPU needs: names upstream imports on an NPU, and no mask (CPU graphs make their own)."""

from __future__ import annotations

import types
from typing import Any

from ..errors import EnvironmentProblem


class NoMask:
    """In place of upstream's LowerTriangularMask, which would allocate 512 MB for what no CPU graph reads."""

    def __init__(self, dtype: Any, max_model_len: int) -> None:
        from mindspore import mint

        self.mask = mint.zeros((1, 1), dtype=dtype)

    def gen_attention_mask(self, *args: Any) -> Any:
        return self.mask


def complete(upstream: Any) -> None:
    """Give upstream's module the names it imports only on an NPU.  Idempotent."""
    if hasattr(upstream, "ms"):
        return
    import mindspore
    import numpy

    upstream.ms, upstream.np, upstream.Tensor = mindspore, numpy, mindspore.Tensor
    upstream.mint, upstream.mutable = mindspore.mint, mindspore.mutable
    upstream.torch_npu = types.SimpleNamespace(npu=types.SimpleNamespace(synchronize=lambda: None))
    upstream.LowerTriangularMask = NoMask


def no_npu_target() -> str:
    raise EnvironmentProblem(
        "This artifact has graphs for the CPU only; this machine serves on an NPU.",
        "Graphs for Ascend are not compiled by this version.",
    )

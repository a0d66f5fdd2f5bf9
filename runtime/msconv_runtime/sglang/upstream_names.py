"""Names that SGLang's MindSpore module has on an NPU only."""

from __future__ import annotations

import types
from typing import Any


class NoMask:
    """In place of upstream's LowerTriangularMask, which allocates 512 MB: the graphs' masks are made elsewhere."""

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

"""A compiled kernel in a graph: a name, and the shape of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from msconv_runtime.kernels import LIBRARY


def kernel(name: str, shape: Callable[..., Any], inputs: int, outputs: int = 1) -> Any:
    """The primitive of a compiled kernel.  `shape` takes the inputs' shapes, with -1 where they are dynamic."""
    info = CustomRegOp(name)
    for i in range(inputs):
        info = info.input(i, f"x{i}", "required")
    for i in range(outputs):
        info = info.output(i, f"y{i}", "required")
    info = info.dtype_format(*[DataType.None_None] * (inputs + outputs)).target("CPU")
    dtype = ms.float32 if outputs == 1 else (ms.float32,) * outputs
    return ops.Custom(f"{LIBRARY}:{name}", shape, dtype, "aot", reg_info=info.get_op_info())

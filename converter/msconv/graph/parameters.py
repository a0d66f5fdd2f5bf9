"""Graph parameters that cost no memory, and keep the names of the weights they stand for."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Parameter, nn
from mindspore.common.initializer import initializer

from msconv_runtime import dtypes

DTYPES = {name: getattr(ms, t.mindspore) for name, t in dtypes.DTYPES.items() if t.storable or name == "int64"}
NAMES = {v: k for k, v in DTYPES.items()}


def parameter(name: str, shape: tuple[int, ...], dtype: Any) -> Parameter:
    """A named placeholder.  Build the net under `no_init_parameters()`; no byte is allocated."""
    p = Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False)
    p.weight_name = name  # no_init_parameters() replaces the name by the attribute path
    return p


def restore_names(net: nn.Cell) -> list[Parameter]:
    """Give every parameter its weight's name again, before export."""
    parameters = list(net.get_parameters())
    for p in parameters:
        p.name = p.weight_name
    return parameters

"""Calling the interpreter's kernels, and values to call them with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msconv.mindir.kernels import KERNELS, Context

Array = NDArray[Any]

EXACT = Context(True, torch.bfloat16)
EXACT_HALF = Context(True, torch.float16)
ROUNDED = Context(False, torch.bfloat16)
CLOSE = 1e-5  # float32 against float64, values about 1

torch.set_num_threads(1)  # of many small calls


def call(kind: str, *inputs: Any, context: Context = EXACT, **attributes: Any) -> Any:
    return KERNELS[kind].run(context, attributes, *inputs)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def close(found: torch.Tensor, expected: Any) -> None:
    expected = np.asarray(expected, np.float64)
    assert tuple(found.shape) == expected.shape
    assert np.abs(found.double().numpy() - expected).max(initial=0) < CLOSE

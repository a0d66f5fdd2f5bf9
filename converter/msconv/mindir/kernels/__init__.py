"""What each primitive computes, in torch.  A primitive or attribute that is not here is an error."""

from __future__ import annotations

from . import ascend, ascend_moe, compiled, int8, plain
from .table import KERNELS, Context, Kernel, Recorder

__all__ = ["KERNELS", "Context", "Kernel", "Recorder", "ascend", "ascend_moe", "compiled", "int8", "plain"]

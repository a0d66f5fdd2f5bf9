"""What each primitive computes, in torch.  A primitive or attribute that is not here is an error."""

from __future__ import annotations

from . import ascend, ascend_moe, compiled, plain
from .table import KERNELS, Context, Kernel

__all__ = ["KERNELS", "Context", "Kernel", "ascend", "ascend_moe", "compiled", "plain"]

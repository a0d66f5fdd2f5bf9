"""sgl_kernel_npu: any part of it can be imported; its kernels raise when they are called, but for the page
allocator's, which SGLang cannot do without, and those of speculative decoding."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import Any

import torch
from torch_npu import missing

ALLOCATOR = "sgl_kernel_npu.mem_cache.allocator"
DRAFTS = "sgl_kernel_npu.drafts"  # a file of ours
VERIFICATION = "sgl_kernel_npu.sample.verify_tree_greedy"


def _extend(
    prefix_lens: Any, seq_lens: Any, last_loc: Any, free_pages: Any, out: Any, upper: int, page: int, most: int
) -> None:
    """Slots for new tokens, into `out`: those of a sequence fill its last page, then take free pages in order.

    prefix_lens, seq_lens, last_loc [B]: tokens cached, tokens afterwards, and the slot of the last cached one.
    """
    pages = iter(free_pages.tolist())
    slots = []
    for cached, length, slot in zip(prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist(), strict=True):
        for position in range(cached, length):
            slot = slot + 1 if position % page else next(pages) * page
            slots.append(slot)
    out.copy_(torch.tensor(slots, dtype=out.dtype))


class _Launched:
    """A Triton kernel is called as kernel[grid](...)."""

    def __getitem__(self, grid: Any) -> Any:
        return _extend


class _Parts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        ours = name.startswith("sgl_kernel_npu.") and name != DRAFTS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        def absent(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return missing(f"{module.__name__}.{name}")

        if module.__name__ == ALLOCATOR:
            module.alloc_extend_kernel = _Launched()
        if module.__name__ == VERIFICATION:
            from .drafts import verify_tree_greedy

            module.verify_tree_greedy = verify_tree_greedy
        module.__getattr__ = absent


sys.meta_path.append(_Parts())

"""The kernels of speculative decoding that SGLang calls on an NPU, in torch, on copies in the host's memory.

Names and arguments are those of SGLang's calls (`kernels/ops/speculative`); what they compute is what its Triton
kernels for other devices compute.  Arguments that are written to are so marked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msconv_runtime.sglang.standins.for_sgl_kernel.sgl_kernel.drafts import (
    assign_extend_cache_locs_cpu,
    build_tree_kernel_efficient_cpu,
    verify_tree_greedy_cpu,
)

FULL, OF_DRAFTS = 0, 1  # SGLang's TreeMaskMode: with columns for what is cached, and without


def cache_loc_update(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out: Tensor
) -> None:
    """Write to `out` the slots of each sequence from `start` to `end`."""
    found = out.cpu()
    given = (t.cpu() for t in (req_pool_indices, req_to_token, start, end))
    assign_extend_cache_locs_cpu(*given, found, req_to_token.shape[1])
    out.copy_(found)


def build_tree_kernel_efficient(
    parent_list: Tensor,
    selected_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Write masks, positions and links of the drafts' trees.  In a mask of mode FULL the columns of what is cached
    stay as they are."""
    if tree_mask_mode not in (FULL, OF_DRAFTS):
        raise NotImplementedError(f"a tree mask of mode {int(tree_mask_mode)}")
    count, width = len(seq_lens), draft_token_num
    drafts = torch.zeros(count * width * width, dtype=tree_mask.dtype)
    written = (positions, retrieve_index, retrieve_next_token, retrieve_next_sibling)
    found = [t.cpu() for t in written]
    given = (t.cpu() for t in (parent_list, selected_index, seq_lens))
    build_tree_kernel_efficient_cpu(*given, drafts, *found, topk, depth, width, OF_DRAFTS)
    for tensor, values in zip(written, found, strict=True):
        tensor.copy_(values)
    if tree_mask_mode == OF_DRAFTS:
        tree_mask[: len(drafts)].copy_(drafts)
        return
    begin = 0
    for length, part in zip(seq_lens.tolist(), drafts.view(count, width, width), strict=True):
        end = begin + width * (length + width)
        tree_mask[begin:end].view(width, length + width)[:, length:].copy_(part)
        begin = end


def verify_tree_greedy(predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, **given: Any) -> None:
    """Follow the target's tokens down each tree of drafts: `predicts`, `accept_index` and `accept_token_num` are
    written to."""
    written = (predicts, accept_index, accept_token_num)
    found = [t.cpu() for t in written]
    verify_tree_greedy_cpu(*found, **{name: tensor.cpu() for name, tensor in given.items()})
    for tensor, values in zip(written, found, strict=True):
        tensor.copy_(values)

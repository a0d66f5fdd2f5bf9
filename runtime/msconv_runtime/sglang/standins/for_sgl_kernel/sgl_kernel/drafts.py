"""The operations of speculative decoding that SGLang takes from sgl_kernel on a CPU, in torch.

Their names and arguments are sgl_kernel's.  Written from what SGLang's callers and its Triton kernels for other
devices say that they do.  Arguments that are written to are so marked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _stretches(rows: Tensor, begins: Tensor, ends: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Of each sequence: its row of a table, begin and end there, and where its values begin among all."""
    at = 0
    for row, begin, end in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
        yield row, begin, end, at
        at += end - begin


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out: Tensor, pool_len: int
) -> None:
    """Write to `out` the slots of each sequence from `start` to `end`."""
    for row, begin, stop, at in _stretches(req_pool_indices, start, end):
        out[at : at + stop - begin] = req_to_token[row, begin:stop].to(out.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    pool_len: int,
    topk: int,
    num_cols: int,
) -> None:
    """Write to `out` the slots of each sequence's next topk * num_cols tokens."""
    ends = seq_lens + topk * num_cols
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out, pool_len)


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, pool_len: int
) -> None:
    """Write to `req_to_token` the slots of each sequence from `start` to `end`."""
    for row, begin, stop, at in _stretches(req_pool_indices, start, end):
        req_to_token[row, begin:stop] = slots[at : at + stop - begin].to(req_to_token.dtype)


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus: Tensor, stride: int) -> None:
    """Write to `bonus` the last token that each sequence accepts."""
    last = torch.arange(accept_lens.numel()) * stride + accept_lens.long() - 1
    bonus.copy_(accept_tokens.flatten()[last].to(bonus.dtype))


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, out_cache_loc: Tensor, accepted: Tensor) -> None:
    """Write to `accepted` the slots of all tokens that are accepted, in order."""
    index = accept_index.flatten()
    index = index[index > -1].long()
    accepted[: index.numel()] = out_cache_loc[index].to(accepted.dtype)


def copy_all_layer_kv_cache_cpu(addresses: Tensor, widths: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Copy rows of all caches from `sources` to `targets`, as they were before.  A cache begins at its address,
    and its rows are so many bytes wide."""
    pairs = [(t, s) for t, s in zip(targets.tolist(), sources.tolist(), strict=True) if t != s]
    for address, width in zip(addresses.tolist(), widths.tolist(), strict=True):
        rows = [ctypes.string_at(address + source * width, width) for _, source in pairs]
        for (target, _), row in zip(pairs, rows, strict=True):
            ctypes.memmove(address + target * width, row, width)


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Follow the target's tokens down each tree of drafts.

    Written to: `predicts` [B * k], the target's token after each accepted draft; `accept_index` [B, depth], their
    places among all; `accept_token_num` [B], how many drafts."""
    wanted = target_predict.flatten().tolist()
    depth = accept_index.shape[1]
    for b, tokens in enumerate(candidates.tolist()):
        places, child, sibling = (
            links[b].tolist() for links in (retrive_index, retrive_next_token, retrive_next_sibling)
        )
        node, path = 0, [0]
        while len(path) < depth:
            node = child[node]
            while node != -1 and tokens[node] != wanted[places[path[-1]]]:
                node = sibling[node]
            if node == -1:
                break
            path.append(node)
        for i, node in enumerate(path):
            accept_index[b, i] = places[node]
            predicts[places[node]] = wanted[places[node]]
        accept_token_num[b] = len(path) - 1


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: Any,
) -> None:
    """Write masks [B, k, k], positions and links of the drafts' trees; the first of the k is each tree's root.

    `selected_index` [B, k - 1]: which of a step's candidates each draft is; `parent_list`: those of all steps."""
    if int(tree_mask_mode) != 1:
        raise NotImplementedError(f"a tree mask of mode {tree_mask_mode}: on a CPU it has k columns")
    masks = tree_mask.view(-1, draft_token_num, draft_token_num)
    for b, chosen in enumerate(selected_index.tolist()):
        listed = parent_list[b].tolist() if parent_list.numel() else []
        parents = [-1]
        for index in chosen:
            step = index // topk
            parents.append(chosen.index(listed[step]) + 1 if step else 0)
        mask = torch.eye(draft_token_num, dtype=torch.bool)
        for node, parent in enumerate(parents[1:], 1):
            mask[node] |= mask[parent]  # a parent stands before its children
        masks[b] = mask.to(masks.dtype)
        _link(
            mask, parents, b, int(seq_lens[b]), positions, retrive_index, retrive_next_token, retrive_next_sibling
        )


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Write positions and links of trees that masks [B, k, k] give: row i has the ancestors of draft i."""
    masks = tree_mask[: batch_size * draft_token_num**2].view(batch_size, draft_token_num, draft_token_num).bool()
    for b, mask in enumerate(masks):
        above = torch.tril(mask, -1)
        parents = [max(row.nonzero().flatten().tolist(), default=-1) for row in above]
        whole = above | torch.eye(draft_token_num, dtype=torch.bool)
        retrive_next_token[b] = retrive_next_sibling[b] = -1
        _link(
            whole, parents, b, int(seq_lens[b]), positions, retrive_index, retrive_next_token, retrive_next_sibling
        )


def _link(
    mask: Tensor,
    parents: list[int],
    b: int,
    length: int,
    positions: Tensor,
    index: Tensor,
    child: Tensor,
    sibling: Tensor,
) -> None:
    """Write what follows of one tree from its mask and parents: children in their order, the first one first."""
    count = len(parents)
    positions.view(-1, count)[b] = mask.sum(1) - 1 + length
    index[b] = torch.arange(b * count, (b + 1) * count)
    for node in range(count - 1, 0, -1):
        if (parent := parents[node]) >= 0:
            sibling[b, node] = child[b, parent].clone()
            child[b, parent] = node

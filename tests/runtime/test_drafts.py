"""Batches of drafts, and the operations that stand in for sgl_kernel's, against what they are said to do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msconv_runtime.sglang import drafts
from msconv_runtime.sglang.environment import STANDINS


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    path = Path(STANDINS, "for_sgl_kernel/sgl_kernel/drafts.py")
    spec = importlib.util.spec_from_file_location("msconv_test_sgl_kernel_drafts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def random_tree(rng: Any, count: int) -> list[int]:
    """Each node's parent; the root has none."""
    return [-1, *(int(rng.integers(0, node)) for node in range(1, count))]


def ancestors(parents: list[int], node: int) -> list[int]:
    """From the root down to the node itself."""
    return [*(ancestors(parents, parents[node]) if parents[node] >= 0 else []), node]


def mask_of(parents: list[int]) -> Any:
    mask = np.zeros((len(parents), len(parents)), bool)
    for node in range(len(parents)):
        mask[node, ancestors(parents, node)] = True
    return mask


def test_a_chain_is_several_new_tokens_of_each_sequence() -> None:
    tables = np.arange(8, dtype=np.int32).reshape(2, 4)
    batch = drafts.chains(ints(1, 2, 3, 4), ints(5, 6, 9, 10), ints(20, 21, 30, 31), tables, ints(5, 9), 2)
    assert batch.q_lens.tolist() == [2, 2]
    assert batch.context_lens.tolist() == [7, 11]
    assert batch.block_tables is tables


def verify(topk: int, mask: Any = None) -> Any:
    """SGLang's batch of two sequences of which drafts are verified."""
    mode = SimpleNamespace(is_target_verify=lambda: True)
    info = SimpleNamespace(tree_topk=topk, custom_mask=mask)
    return SimpleNamespace(req_pool_indices=torch.tensor([2, 0]), forward_mode=mode, spec_info=info)


@pytest.mark.parametrize("page", [1, 16])
def test_a_chain_fits_any_page(page: int) -> None:
    """As on an NPU, where pages have 16 slots and more."""
    table = torch.arange(3 * 48, dtype=torch.int32).view(3, 48)
    positions = ints(20, 21, 22, 5, 6, 7)
    slots = ints(*(96 + p for p in positions[:3]), *positions[3:])
    batch = drafts.batch_of(ints(*range(6)), positions, slots, verify(1), table, page)
    assert batch.q_lens.tolist() == [3, 3]
    assert batch.context_lens.tolist() == [23, 8]
    for row, token in ((0, 0), (0, 2), (1, 3), (1, 5)):
        position = int(positions[token])
        assert batch.block_tables[row, position // page] * page + position % page == slots[token]


def test_a_tree_needs_pages_of_one_slot() -> None:
    mask = torch.tensor(np.stack([mask_of([-1, 0, 0])] * 2)).flatten()
    table = torch.arange(3 * 48, dtype=torch.int32).view(3, 48)
    positions, slots = ints(20, 21, 21, 5, 6, 6), ints(116, 117, 118, 5, 6, 7)
    batch = drafts.batch_of(ints(*range(6)), positions, slots, verify(-1, mask), table, 1)
    assert batch.context_lens.tolist() == [21, 22, 22, 6, 7, 7]
    assert batch.block_tables[2, 19:22].tolist() == [115, 116, 118]
    assert batch.block_tables[5, 4:7].tolist() == [4, 5, 7]
    with pytest.raises(ValueError, match="have 16"):
        drafts.batch_of(ints(*range(6)), positions, slots, verify(-1, mask), table, 16)


@pytest.mark.parametrize("seed", range(5))
def test_a_draft_of_a_tree_sees_its_ancestors_at_their_positions(seed: int) -> None:
    rng, count, width = np.random.default_rng(seed), 3, 6
    before = rng.integers(1, 9, count).astype(np.int32)
    trees = [random_tree(rng, width) for _ in range(count)]
    depths = [[len(ancestors(tree, node)) - 1 for node in range(width)] for tree in trees]
    positions = np.concatenate([d + b for d, b in zip(np.array(depths, np.int32), before, strict=True)])
    prefix = rng.integers(100, 200, (count, int(before.max()) + width)).astype(np.int32)
    slots = np.arange(count * width, dtype=np.int32)
    batch = drafts.trees(slots + 50, positions, slots, prefix, before, np.stack([mask_of(t) for t in trees]))
    assert batch.q_lens.tolist() == [1] * (count * width)
    for b, tree in enumerate(trees):
        for node in range(width):
            row = b * width + node
            wanted = [*prefix[b, : before[b]], *(b * width + a for a in ancestors(tree, node))]
            assert batch.block_tables[row, : batch.context_lens[row]].tolist() == wanted


@pytest.mark.parametrize("seed", range(5))
def test_links_of_a_tree_lead_along_the_targets_tokens(kernel: ModuleType, seed: int) -> None:
    rng, count, width = np.random.default_rng(seed), 4, 7
    trees = [random_tree(rng, width) for _ in range(count)]
    masks = torch.tensor(np.stack([mask_of(tree) for tree in trees])).flatten()
    lengths = torch.tensor([3, 5, 1, 9])
    positions = torch.zeros(count * width, dtype=torch.long)
    index, child, sibling = (torch.full((count, width), 77) for _ in range(3))
    kernel.reconstruct_indices_from_tree_mask(masks, lengths, positions, index, child, sibling, count, width)
    candidates = torch.tensor(rng.integers(0, 3, (count, width)))
    target = torch.tensor(rng.integers(0, 3, (count, width)))
    predicts = torch.zeros(count * width, dtype=torch.int32)
    accepted, number = torch.full((count, width), -1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    kernel.verify_tree_greedy_cpu(predicts, accepted, number, candidates, index, child, sibling, target)
    for b, tree in enumerate(trees):
        assert positions[b * width : (b + 1) * width].tolist() == [
            int(lengths[b]) + len(ancestors(tree, node)) - 1 for node in range(width)
        ]
        path = [0]
        while found := [
            node for node in range(width) if tree[node] == path[-1] and candidates[b, node] == target[b, path[-1]]
        ]:
            path.append(found[0])
        assert int(number[b]) == len(path) - 1
        assert accepted[b, : len(path)].tolist() == [b * width + node for node in path]
        assert (accepted[b, len(path) :] == -1).all()
        assert [int(predicts[b * width + node]) for node in path] == [int(target[b, node]) for node in path]


def test_a_tree_is_built_from_the_candidates_that_were_chosen(kernel: ModuleType) -> None:
    """Two candidates a step.  Chosen: both of the first step, then 2 (after the first), 5 (after the second)."""
    parents, chosen = torch.tensor([[-1, 0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 5]])
    width = 5
    mask = torch.ones(width * width, dtype=torch.bool)
    positions = torch.zeros(width, dtype=torch.long)
    index, child, sibling = (torch.full((1, width), -1) for _ in range(3))
    kernel.build_tree_kernel_efficient_cpu(
        parents, chosen, torch.tensor([4]), mask, positions, index, child, sibling, 2, 3, width, 1
    )
    assert (mask.view(width, width).numpy() == mask_of([-1, 0, 0, 1, 2])).all()
    assert positions.tolist() == [4, 5, 5, 6, 6]
    assert child[0].tolist() == [1, 3, 4, -1, -1]
    assert sibling[0].tolist() == [-1, 2, -1, -1, -1]


def test_slots_are_taken_from_tables_and_written_to_them(kernel: ModuleType) -> None:
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    rows, start, end = torch.tensor([1, 0]), torch.tensor([2, 4]), torch.tensor([4, 7])
    out = torch.zeros(5, dtype=torch.long)
    kernel.assign_extend_cache_locs_cpu(rows, table, start, end, out, 10)
    assert out.tolist() == [12, 13, 4, 5, 6]
    kernel.assign_req_to_token_pool_cpu(rows, table, start, end, out + 50, 10)
    assert table[1, 2:4].tolist() == [62, 63] and table[0, 4:7].tolist() == [54, 55, 56]
    kernel.assign_draft_cache_locs_contiguous_cpu(rows, table, start, out[:4], 10, 1, 2)
    assert out[:4].tolist() == [62, 63, 54, 55]


def test_rows_of_caches_move_as_they_were_before(kernel: ModuleType) -> None:
    caches = [torch.arange(12.0).view(6, 2), torch.arange(18.0).view(6, 3) + 100]
    before = [cache.clone() for cache in caches]
    addresses = torch.tensor([cache.data_ptr() for cache in caches])
    widths = torch.tensor([cache.stride(0) * 4 for cache in caches])
    targets, sources = torch.tensor([1, 2, 5]), torch.tensor([2, 1, 5])
    kernel.copy_all_layer_kv_cache_cpu(addresses, widths, targets, sources)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[[0, 2, 1, 3, 4, 5]])


def test_what_is_accepted_is_taken_in_order(kernel: ModuleType) -> None:
    bonus = torch.zeros(2, dtype=torch.long)
    tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    kernel.fill_bonus_tokens_cpu(tokens, torch.tensor([2, 3]), bonus, 3)
    assert bonus.tolist() == [6, 10]
    accepted = torch.zeros(6, dtype=torch.long)
    index = torch.tensor([[0, 2, -1], [3, -1, -1]])
    kernel.fill_accept_out_cache_loc_cpu(index, torch.arange(6) + 40, accepted)
    assert accepted[:3].tolist() == [40, 42, 43]

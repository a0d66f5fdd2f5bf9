"""Batches of speculative decoding: drafts that the target verifies, and steps of a draft model.

k drafts of each of B sequences are one batch of B * k tokens, all of whose logits are asked for.  The graphs write
all keys and values of a call before they read any, so a token sees those before it in the same call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..graphs import Graphs, Outputs
from ..paging import Batch, Ints, take
from ..roles import HIDDEN, LOGITS, Role


def chains(input_ids: Ints, positions: Ints, slots: Ints, tables: Ints, before: Ints, width: int) -> Batch:
    """`width` tokens of each sequence, one after another, after the `before` that it has in the cache."""
    return Batch(input_ids, positions, slots, tables, before + width, np.full(len(before), width, np.int32))


def trees(
    input_ids: Ints, positions: Ints, slots: Ints, tables: Ints, before: Ints, seen: NDArray[np.bool_]
) -> Batch:
    """Drafts that branch, for pages of one slot: each token is a sequence of its own.  Its table has the slots of
    its sequence, and after them those of its ancestors, each at its position.

    `tables` [B, P]; `before` [B]; `seen` [B, k, k]: row i has the ancestors of draft i and itself, none after it.
    """
    count, width, _ = seen.shape
    rows = np.zeros((count * width, max(tables.shape[1], int(positions.max()) + 1)), np.int32)
    rows[:, : tables.shape[1]] = np.repeat(tables, width, 0)
    for sequence in range(count):
        own = slots[sequence * width : (sequence + 1) * width]
        for draft in range(width):
            path = own[: draft + 1][seen[sequence, draft, : draft + 1]]
            row, begin = sequence * width + draft, int(before[sequence])
            rows[row, begin : begin + len(path)] = path
    return Batch(input_ids, positions, slots, rows, positions + 1, np.ones(count * width, np.int32))


def branches(input_ids: Ints, positions: Ints, slots: Ints, rows: Ints, before: Ints, steps: int) -> Batch:
    """A step of drafts that branch, for pages of one slot: each branch is a sequence of its own.

    `rows` [B, P]: slots of each sequence; after the `before` [B] that it has in the cache, each branch has `steps`
    of them.  A branch sees what an earlier step put into its own slots: so does SGLang's own attention."""
    width = len(positions) // len(before)
    tables = np.repeat(rows, width, 0)
    for row, position in enumerate(positions):
        begin = int(before[row // width])
        own = begin + row % width * steps
        step = int(position) - begin
        tables[row, begin : begin + step + 1] = rows[row // width, own : own + step + 1]
    tables = tables[:, : int(positions.max()) + 1]
    return Batch(input_ids, positions, slots, tables, positions + 1, np.ones(len(positions), np.int32))


def batch_of(input_ids: Ints, positions: Ints, slots: Ints, forward_batch: Any, table: Any, page: int) -> Batch:
    """The batch of SGLang's TARGET_VERIFY or DRAFT_EXTEND_V2.  `table`: its slots of each sequence by position."""
    count = len(forward_batch.req_pool_indices)
    width = len(positions) // count
    before = positions[::width].copy()  # the first draft stands right after what is cached
    info = forward_batch.spec_info
    longest = int(before.max()) + width
    rows = np.array(table[forward_batch.req_pool_indices, :longest].cpu().numpy(), np.int32)
    tables = rows[:, ::page] // page
    if not forward_batch.forward_mode.is_target_verify() or info.tree_topk == 1:
        return chains(input_ids, positions, slots, tables, before, width)
    if page != 1:
        raise ValueError(f"drafts that branch need pages of one slot, these have {page}")
    seen = info.custom_mask[: count * width * width].view(count, width, width).cpu().numpy()
    return trees(input_ids, positions, slots, tables, before, seen)


def run(
    graphs: Graphs,
    role: Role,
    batch: Batch,
    caches: Sequence[Any],
    hidden: NDArray[np.float32],
    accepted: NDArray[Any] | None,
) -> Outputs:
    """What a draft that reads `hidden` states [T, ..] gives: logits and states [B, ..] of each last token.

    After a verification SGLang gives all k tokens of each sequence, and reads what comes of the last of them that
    was `accepted`, [B] of how many.  Only those up to it run, and rows [B * k, ..] of others are zeros."""
    if accepted is None:
        found = graphs.in_parts(role, batch, caches, hidden=hidden)
        return {LOGITS: found[LOGITS], HIDDEN: found[HIDDEN][np.cumsum(batch.q_lens) - 1]}
    counts = [int(n) for n in accepted]
    begins = np.cumsum(batch.q_lens) - batch.q_lens
    members = [(i, int(begin), n) for i, (begin, n) in enumerate(zip(begins, counts, strict=True))]
    kept = np.concatenate([np.arange(begin, begin + n) for _, begin, n in members])
    found = graphs.in_parts(role, take(batch, members, graphs.page), caches, hidden=hidden[kept])
    rows = {LOGITS: found[LOGITS], HIDDEN: found[HIDDEN][np.cumsum(counts) - 1]}
    spread = {name: np.zeros((len(hidden), values.shape[1]), np.float32) for name, values in rows.items()}
    for name, values in rows.items():
        spread[name][begins + counts - 1] = values
    return spread

"""Whether the inputs of one call mean what the graph takes them for: pages, slots, tables, lengths, masks, caches,
and the graph that was chosen.  Each problem is a sentence with the place and the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.artifact import Graph, GraphInput
from msconv_runtime.paging import Batch
from msconv_runtime.roles import ROLES

from .records import Cache, Call

TILE = 128  # a side of flash attention's mask
HIDDEN = -10000.0  # what a mask adds to a score that must not count
SOME = 3  # problems of one kind that are told

Ints = NDArray[np.integer]


def batch_of(call: Call) -> Batch:
    """The integer inputs of a call."""
    return Batch(*(call.inputs[f.name].numpy() for f in fields(Batch)))


def _tokens_of(batch: Batch, sequence: int) -> slice:
    """Which of the T tokens are new ones of a sequence."""
    end = int(batch.q_lens[: sequence + 1].sum())
    return slice(end - int(batch.q_lens[sequence]), end)


def call_problems(call: Call, graph: Graph, page: int) -> list[str]:
    """`page`: slots a page of the server's pool."""
    batch = batch_of(call)
    found = list(_lengths(batch))
    if found:  # nothing else can be read
        return found
    found += _caches(call.caches, graph.caches, page, call.is_warm_up)
    found += islice(_positions(batch), SOME)
    found += islice(_slots(batch, page, call), SOME)
    found += _choice(batch, graph.role)
    found += _mask(batch, graph, call.inputs["attention_mask"].float())
    return found


def _lengths(batch: Batch) -> Iterator[str]:
    tokens, sequences = len(batch.input_ids), len(batch.q_lens)
    for name in ("positions", "slots"):
        if len(getattr(batch, name)) != tokens:
            yield f"{name}: {len(getattr(batch, name))} for {tokens} tokens"
    for name in ("block_tables", "context_lens"):
        if len(getattr(batch, name)) != sequences:
            yield f"{name}: {len(getattr(batch, name))} for {sequences} sequences"
    if batch.q_lens.sum() != tokens or batch.q_lens.min(initial=1) < 1:
        yield f"q_lens: {batch.q_lens.tolist()} for {tokens} tokens"
    elif len(batch.context_lens) == sequences and (batch.context_lens < batch.q_lens).any():
        yield (
            f"context_lens: {batch.context_lens.tolist()} do not count the new tokens, q_lens "
            f"{batch.q_lens.tolist()}"
        )


def _caches(caches: list[Cache], wanted: list[GraphInput], page: int, warm_up: bool) -> Iterator[str]:
    if len(caches) != len(wanted):
        yield f"caches: {len(caches)}, the graph takes {len(wanted)}"
        return
    if len({c.at for c in caches}) != len(caches):
        yield "caches: two of them are the same memory"
    for cache, like in zip(caches, wanted, strict=True):
        if cache.shape[1] != page or list(cache.shape[2:]) != like.shape[2:]:
            yield (
                f"{like.name}: is {list(cache.shape)}; SGLang's pages have {page} slots, the graph takes "
                f"[pages, {page}, {', '.join(map(str, like.shape[2:]))}]"
            )
            return
        kind, _, layer = like.name.partition("_cache.")
        expected = f"{'k' if kind == 'latent' else kind} {layer}"
        if not warm_up and cache.buffer != expected:
            yield f"{like.name}: is SGLang's buffer `{cache.buffer or 'none'}`, not `{expected}`"


def _positions(batch: Batch) -> Iterator[str]:
    for i, (context, new) in enumerate(zip(batch.context_lens, batch.q_lens, strict=True)):
        found = batch.positions[_tokens_of(batch, i)]
        if (found != np.arange(context - new, context)).any():
            yield (
                f"positions: {_span(found)} of sequence {i}, whose context_lens is {context} with {new} new: they "
                f"must be {context - new} to {context - 1}"
            )


def _slots(batch: Batch, page: int, call: Call) -> Iterator[str]:
    """A slot is the page that the table names for the position, and the position's place in it."""
    num_slots = call.caches[0].shape[0] * page
    if batch.slots.size and not 0 <= batch.slots.min() <= batch.slots.max() < num_slots:
        yield f"slots: {_span(batch.slots)} of {num_slots}"
    if len(np.unique(batch.slots)) != len(batch.slots):
        yield f"slots: two tokens are written to the same one: {batch.slots.tolist()[:16]}"
    for i, context in enumerate(batch.context_lens):
        pages = -(-int(context) // page)
        if batch.block_tables.shape[1] < pages:
            yield f"block_tables: {batch.block_tables.shape[1]} pages wide, sequence {i} has {pages}"
            continue
        table = batch.block_tables[i, :pages]
        if table.size and not 0 <= table.min() <= table.max() < call.caches[0].shape[0]:
            yield f"block_tables: pages {table.tolist()} of sequence {i}; there are {call.caches[0].shape[0]}"
            continue
        if len(set(table.tolist())) != pages:
            yield f"block_tables: sequence {i} has a page twice: {table.tolist()}"
        new = _tokens_of(batch, i)
        positions = np.arange(context - batch.q_lens[i], context)
        expected = table[positions // page] * page + positions % page
        if (batch.slots[new] != expected).any():
            yield (
                f"slots: {_span(batch.slots[new])} of sequence {i}; by its block_tables {table.tolist()[:8]} with "
                f"pages of {page} they are {_span(expected)}"
            )


def _choice(batch: Batch, role: str) -> Iterator[str]:
    """The prefill graph's attention sees new tokens only; it is the one for batches without cached tokens."""
    cached = batch.context_lens - batch.q_lens
    if ROLES[role].begins and cached.any():
        yield f"graph: {role} for sequences with {cached.tolist()} cached tokens, which it does not see"
    if role == "decode" and not cached.any():
        yield f"graph: decode for {len(cached)} sequences without a cached token, for which prefill is"


def _mask(batch: Batch, graph: Graph, found: torch.Tensor) -> Iterator[str]:
    if ROLES[graph.role].begins:
        dtype = next(i.dtype for i in graph.inputs if i.name == "attention_mask")
        expected = torch.triu(torch.full((TILE, TILE), 1.0 if dtype == "bfloat16" else HIDDEN), 1)
        meaning = f"the strict upper triangle of {TILE} x {TILE}"
    elif int(batch.q_lens.max(initial=1)) == 1:
        expected, meaning = torch.zeros(1, 1), "one zero, where each sequence has one new token"
    else:
        columns = torch.arange(int(batch.context_lens.max()))
        hidden = columns[None, :] > torch.from_numpy(batch.positions)[:, None]
        expected = hidden * HIDDEN
        meaning = "a row a token that hides what comes after its position"
    if found.shape != expected.shape:
        yield f"attention_mask: is {list(found.shape)}; {meaning}, is {list(expected.shape)}"
    else:  # half precision rounds -10000
        wrong = ((found - expected).abs() > expected.abs() / 256) | ((found == 0) != (expected == 0))
        if wrong.any():
            yield f"attention_mask: {int(wrong.sum())} of {found.numel()} values are wrong; it must be {meaning}"


def _span(values: Ints) -> str:
    """`7`, `7 to 9`, or the first of them."""
    if len(values) == 1:
        return str(int(values[0]))
    if len(values) and (np.diff(values) == 1).all():
        return f"{int(values[0])} to {int(values[-1])}"
    return f"{values.tolist()[:8]}"

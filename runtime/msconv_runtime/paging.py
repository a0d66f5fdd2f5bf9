"""Sequences and their pages: which slot each new token takes, and the batch that says so to a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

Ints = NDArray[np.int32]
Stretch = tuple[int, int, int]  # of a batch: a sequence, its first token among all, how many


@dataclass(frozen=True)
class Batch:
    """Sequences to run, ragged.  T tokens, B sequences, P pages wide.

    input_ids, positions, slots [T]; block_tables [B, P]; context_lens (new tokens included), q_lens [B].
    slot = page * page_size + offset.
    """

    input_ids: Ints
    positions: Ints
    slots: Ints
    block_tables: Ints
    context_lens: Ints
    q_lens: Ints

    @property
    def arrays(self) -> tuple[Ints, ...]:
        """In the order of the graphs' inputs."""
        return (
            self.input_ids,
            self.positions,
            self.slots,
            self.block_tables,
            self.context_lens,
            self.q_lens,
        )


Chunk = tuple[list[int], list[bool], Batch]  # members, whether each is at its end, the part
RAGGED_TOKENS = 2048  # in one call of a graph that takes sequences as they are
CHUNK_TOKENS = 512  # places (sequences x longest) in one call of one that pads them: bounds its memory
MASK_TILE = 128  # a side of the triangle that flash attention repeats itself
MASK_COEFFICIENT = -10000.0


def attention_mask(is_prefill: bool, batch: Batch, hides: float) -> NDArray[np.float32]:
    """The mask of Ascend graphs, as SGLang's slot makes it: for a prefill graph a triangular tile with `hides`
    where it hides, else (1, 1) for one token a sequence, or a row a token, [T, longest context]."""
    if is_prefill:
        return np.triu(np.full((MASK_TILE, MASK_TILE), hides, np.float32), 1)
    if int(batch.q_lens.max()) == 1:
        return np.zeros((1, 1), np.float32)
    beyond = np.arange(int(batch.context_lens.max()))[None, :] > batch.positions[:, None]
    return beyond * np.float32(MASK_COEFFICIENT)


class Sequences:
    """A batch of growing sequences.  Pages are given out as they are needed, so tables interleave."""

    def __init__(self, count: int, page_size: int) -> None:
        self.page_size = page_size
        self.lengths = [0] * count
        self.num_pages = 0
        self._tables: list[list[int]] = [[] for _ in range(count)]

    def check_count(self, count: int) -> None:
        """Raises UsageError unless so many sequences are running."""
        if not self.lengths:
            raise UsageError("no sequence is running.", "Begin with prefill.")
        if count != len(self.lengths):
            raise UsageError(f"{len(self.lengths)} sequences are running, tokens for {count} were given.")

    def take_back(self, lengths: list[int]) -> None:
        """Undo the last `advance`: sequences have these lengths again, and pages that it took are free."""
        self.lengths = list(lengths)
        for table, length in zip(self._tables, lengths, strict=True):
            del table[-(-length // self.page_size) :]
        self.num_pages = sum(map(len, self._tables))

    def advance(self, tokens: list[list[int]]) -> Batch:
        """Append tokens to each sequence.  Raises UsageError if the number of sequences differs."""
        self.check_count(len(tokens))
        positions: list[int] = []
        slots: list[int] = []
        for i, new in enumerate(tokens):
            table = self._tables[i]
            for position in range(self.lengths[i], self.lengths[i] + len(new)):
                page, offset = divmod(position, self.page_size)
                if page == len(table):
                    table.append(self.num_pages)
                    self.num_pages += 1
                positions.append(position)
                slots.append(table[page] * self.page_size + offset)
            self.lengths[i] += len(new)
        tables = np.zeros((len(tokens), max(map(len, self._tables))), np.int32)
        for row, table in zip(tables, self._tables, strict=True):
            row[: len(table)] = table
        return Batch(
            np.array([t for new in tokens for t in new], np.int32),
            np.array(positions, np.int32),
            np.array(slots, np.int32),
            tables,
            np.array(self.lengths, np.int32),
            np.array([len(new) for new in tokens], np.int32),
        )


def chunks(batch: Batch, page: int, ragged: bool, most: int = RAGGED_TOKENS) -> Iterator[Chunk]:
    """Cut a batch into calls of bounded size, at most `most` tokens: (members, whether each is at its end, the
    part).  Unless a graph takes `ragged` sequences, it makes each as long as the longest.

    A sequence is cut in order, and never twice in one call: later chunks read what earlier ones cached.
    """
    ends = np.cumsum(batch.q_lens)
    members: list[Stretch] = []
    longest = tokens = 0
    limit = min(most, RAGGED_TOKENS if ragged else CHUNK_TOKENS)
    for sequence, (q_len, end) in enumerate(zip(batch.q_lens, ends, strict=True)):
        for begin in range(0, int(q_len), limit):
            size = min(limit, int(q_len) - begin)
            places = tokens + size if ragged else (len(members) + 1) * max(longest, size)
            full = places > limit
            if members and (full or members[-1][0] == sequence):
                yield _part(batch, members, page)
                members, longest, tokens = [], 0, 0
            members.append((sequence, int(end - q_len) + begin, size))
            longest, tokens = max(longest, size), tokens + size
    if members:
        yield _part(batch, members, page)


def _part(batch: Batch, members: list[Stretch], page: int) -> Chunk:
    part = take(batch, members, page)
    sequences = [sequence for sequence, _, _ in members]
    return sequences, (part.context_lens == batch.context_lens[sequences]).tolist(), part


def take(batch: Batch, members: Sequence[Stretch], page: int) -> Batch:
    """The batch that has these stretches of a batch's sequences, one of each at most.  What stands before a
    stretch is taken to be in the cache when the graph runs."""
    ends = np.cumsum(batch.q_lens)
    sequences = [sequence for sequence, _, _ in members]
    tokens = np.concatenate([np.arange(first, first + size) for _, first, size in members])
    left = np.array([ends[s] - (first + size) for s, first, size in members])
    context = batch.context_lens[sequences] - left
    width = -(-int(context.max()) // page)
    return Batch(
        input_ids=batch.input_ids[tokens],
        positions=batch.positions[tokens],
        slots=batch.slots[tokens],
        block_tables=batch.block_tables[sequences, :width],
        context_lens=context.astype(np.int32),
        q_lens=np.array([size for _, _, size in members], np.int32),
    )


@dataclass(frozen=True)
class Tails:
    """The new tokens of each sequence of a batch from its `firsts[i]` on: those whose logits are asked for, one
    row each, in the order of the sequences.  `firsts[i]` is 0 for all of them, and less than the sequence has."""

    batch: Batch
    firsts: Sequence[int]
    page: int

    @property
    def counts(self) -> list[int]:
        """Rows of each sequence."""
        return [int(q_len) - first for q_len, first in zip(self.batch.q_lens, self.firsts, strict=True)]

    def before(self) -> Batch | None:
        """The batch of the tokens before them, which has to run first.  None: there are none."""
        begins = np.cumsum(self.batch.q_lens) - self.batch.q_lens
        members = [(i, int(begins[i]), first) for i, first in enumerate(self.firsts) if first]
        return take(self.batch, members, self.page) if members else None

    def rows(self, begin: int, end: int) -> Batch:
        """The batch of the rows from `begin` up to `end`."""
        members = []
        token = row = 0  # the sequence's first, and its first row
        for i, (q_len, first) in enumerate(zip(self.batch.q_lens, self.firsts, strict=True)):
            low, high = max(begin, row), min(end, row + int(q_len) - first)
            if low < high:
                members.append((i, token + first + low - row, high - low))
            token, row = token + int(q_len), row + int(q_len) - first
        return take(self.batch, members, self.page)

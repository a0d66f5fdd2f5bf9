"""Prefill and decode without a server: a batch of sequences with a paged KV cache of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .artifact import read_manifest
from .errors import EnvironmentProblem, UsageError
from .graphs import Graphs
from .paging import Batch, Sequences
from .weights import LoadMode

Logits = NDArray[np.float32]


class Session:
    """One rank of an artifact, loaded and warmed up.

    session = Session("artifacts/Qwen3-0.6B-tp1")
    logits = session.prefill([[1, 2, 3], [4, 5]])       # [2, vocab] float32: last token of each
    logits = session.decode([7, 8])                     # one more token each
    tokens = session.generate([[1, 2, 3]], 16)          # greedy
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        target: str = "cpu",
        rank: int = 0,
        load: LoadMode = "mmap",
        check_digests: bool = False,
        native: bool = True,
    ) -> None:
        root = Path(artifact)
        manifest = read_manifest(root)
        if target != "cpu":
            raise EnvironmentProblem(
                f"{target} graphs run on an NPU inside SGLang only.", "Use target='cpu' here."
            )
        if manifest.parallel.tp > 1:
            raise EnvironmentProblem(
                f"{root}: is for {manifest.parallel.tp} ranks, and a Session runs one without communication.",
                "Convert with --tp 1, or serve all ranks with `msconv serve`.",
            )
        self.graphs = Graphs(root, manifest, target, rank, load, check_digests, native)
        self.page_size = self.graphs.page
        self._caches: list[Any] = []
        self._num_pages = 0
        self.reset()
        self.graphs.warm_up()

    def reset(self) -> None:
        """Forget all sequences."""
        self._sequences = Sequences(0, self.page_size)

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, by sequence."""
        return list(self._sequences.lengths)

    def prefill(self, prompts: list[list[int]]) -> Logits:
        """Start over with these prompts (any lengths above 0).  Logits of each last token, [B, V]."""
        if not prompts or not all(prompts):
            raise UsageError("prefill needs at least one prompt, and no prompt may be empty.")
        self._sequences = Sequences(len(prompts), self.page_size)
        return self.extend(prompts)

    def extend(self, tokens: list[list[int]]) -> Logits:
        """Append tokens to each sequence; what is cached before them is used.  [B, V]."""
        if not all(tokens):
            raise UsageError("extend needs at least one token for each sequence.", "Leave no list empty.")
        return self.graphs.prefill(self._advance(tokens), self._caches)

    def decode(self, tokens: list[int]) -> Logits:
        """Append one token to each sequence.  [B, V]."""
        batch = self._advance([[t] for t in tokens])
        return self.graphs.decode(batch, self._caches)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, `max_new_tokens` each (ends are not looked for)."""
        out: list[list[int]] = [[] for _ in prompts]
        if max_new_tokens < 1:
            return out
        logits = self.prefill(prompts)
        for step in range(max_new_tokens):
            for tokens, row in zip(out, logits, strict=True):
                tokens.append(int(row.argmax()))
            if step + 1 < max_new_tokens:
                logits = self.decode([tokens[-1] for tokens in out])
        return out

    def _advance(self, tokens: list[list[int]]) -> Batch:
        batch = self._sequences.advance(tokens)
        self._reserve(self._sequences.num_pages)
        return batch

    def _reserve(self, pages: int) -> None:
        """Room for so many pages; grows by doubling and keeps what is there."""
        if pages <= self._num_pages:
            return
        from mindspore import Tensor

        self._num_pages = max(pages, 2 * self._num_pages, 1024 // self.page_size)
        shape = (self._num_pages, self.page_size, *(n or 1 for n in self.graphs.cache_shape[2:]))
        grown = []
        for i in range(self.graphs.num_caches):
            new = np.zeros(shape, np.float32)
            if self._caches:
                old = self._caches[i].asnumpy()
                new[: len(old)] = old
            grown.append(Tensor.from_numpy(new))
        self._caches = grown

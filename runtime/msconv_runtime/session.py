"""Prefill and decode without a server: a batch of sequences with a paged KV cache of its own."""

from __future__ import annotations

import operator
import os
import reprlib
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from .artifact import Artifact
from .artifact.weights import LoadMode
from .errors import ArtifactError, EnvironmentProblem, UsageError
from .graphs import Graphs, Place
from .paging import RAGGED_TOKENS, Batch, Sequences
from .roles import DECODE, HIDDEN, LOGITS, PREFILL, ROLES, VERIFY, Role
from .targets import target_named

Logits = NDArray[np.float32]
Found = TypeVar("Found")

_turn = threading.RLock()  # MindSpore runs one graph at a time in a process: two threads end it, or wait for ever


class _Limits(msgspec.Struct):
    """What config.json says of the inputs."""

    vocab_size: int
    max_position_embeddings: int


class Session:
    """One rank of an artifact, loaded and warmed up.  Threads may call it: they take turns, also with those of
    other sessions, and a `generate` is one turn.  After any error it goes on with the sequences it had; where a
    prefill failed in the middle, with none.

    session = Session("artifacts/Qwen3-0.6B-tp1")
    logits = session.prefill([[1, 2, 3], [4, 5]])       # [2, vocab] float32: last token of each
    logits = session.decode([7, 8])                     # one more token each
    tokens = session.generate([[1, 2, 3]], 16)          # greedy

    `vocab_size`: tokens are 0 to one less.  `max_positions`: so long may a prompt with what it generates be.
    `hidden`: of an artifact with a draft, the hidden states of the last call's tokens, [T, width]; else None.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        target: str = "cpu",
        rank: int = 0,
        load: LoadMode = "mmap",
        check_digests: bool = False,
        compiled: bool = True,
    ) -> None:
        opened = Artifact(artifact)
        if load not in get_args(LoadMode):
            raise UsageError(f"load is {load!r}; it may be 'mmap' or 'read'.")
        if not target_named(target).device.is_host:
            raise EnvironmentProblem(f"{target}{target_named(target).device.runs}", "Use target='cpu' here.")
        if opened.tp > 1:
            raise EnvironmentProblem(
                f"{opened.root}: is for {opened.tp} ranks, and a Session runs one without communication.",
                "Convert with --tp 1, or serve all ranks with `msconv serve`.",
            )
        limits = _limits(opened)
        self.vocab_size, self.max_positions = limits.vocab_size, limits.max_position_embeddings
        self._load = partial(Graphs, opened, target, Place(rank), load, check_digests, compiled)
        self.hidden: NDArray[np.float32] | None = None
        with _turn:
            self.graphs = self._load()
            self._has_failed = False
            self.page_size = self.graphs.page
            self._caches: list[Any] = []
            self._num_pages = 0
            self.reset()
            self.graphs.warm_up()

    def reset(self) -> None:
        """Forget all sequences."""
        with _turn:
            self._sequences = Sequences(0, self.page_size)

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, by sequence."""
        with _turn:
            return list(self._sequences.lengths)

    def prefill(self, prompts: list[list[int]]) -> Logits:
        """Start over with these prompts (any lengths above 0).  Logits of each last token, [B, V].
        Raises UsageError for prompts that the model cannot take, here and in what follows."""
        tokens = self._prompts("prefill", prompts)
        with _turn:
            self.reset()  # the cache is written over from its begin
            fresh = Sequences(len(tokens), self.page_size)
            logits = self._logits(PREFILL, fresh, tokens)
            self._sequences = fresh
            return logits

    def extend(self, tokens: list[list[int]]) -> Logits:
        """Append tokens to each sequence; what is cached before them is used.  [B, V]."""
        with _turn:
            new = self._tokens("extend", tokens, self._sequences)
            self._check_lengths("extend", self._sequences, new)
            return self._logits(PREFILL, self._sequences, new)

    @property
    def has_all_tokens(self) -> bool:
        """Whether the artifact has the graph of `extend_all`."""
        return self.graphs.gives_all_logits

    def extend_all(self, tokens: list[list[int]]) -> Logits:
        """As `extend`, with the logits of every token that is appended, [T, V], in the order of the sequences.
        Raises ArtifactError for an artifact of before there were such graphs."""
        with _turn:
            new = self._tokens("extend_all", tokens, self._sequences)
            self._check_lengths("extend_all", self._sequences, new)
            return self._logits(VERIFY, self._sequences, new)

    def decode(self, tokens: list[int]) -> Logits:
        """Append one token to each sequence, also past `max_positions`: what the model makes of those positions
        nobody has trained.  [B, V]."""
        with _turn:
            new = self._tokens("decode", [[t] for t in _listed("decode", tokens)], self._sequences)
            if len(new) == 1 and self._caches:
                self.graphs.keep_caches(self._caches)
            return self._logits(DECODE, self._sequences, new)

    def run(self, role: str, prompts: list[list[int]]) -> dict[str, NDArray[np.float32]]:
        """Start over with these prompts, and give the outputs, by name, of the graph that has this role.  Raises
        UsageError for a role that is not known, ArtifactError if there is no graph for it among those in use."""
        if role not in ROLES:
            raise UsageError(f"{role}: no such graph role.", f"Roles are: {', '.join(ROLES)}.")
        tokens = self._prompts(role, prompts)
        with _turn:
            self.reset()
            fresh = Sequences(len(tokens), self.page_size)
            found = self._run(
                fresh, tokens, lambda batch, caches: self.graphs.in_parts(ROLES[role], batch, caches)
            )
            self._sequences = fresh
            return found

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, `max_new_tokens` each (ends are not looked for)."""
        if _whole(max_new_tokens) is None or max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is {reprlib.repr(max_new_tokens)}; it is a whole number from 0 on.")
        tokens = self._prompts("generate", prompts, max_new_tokens - 1)
        out: list[list[int]] = [[] for _ in tokens]
        if max_new_tokens < 1:
            return out
        with _turn:
            logits = self.prefill(tokens)
            for step in range(max_new_tokens):
                for new, row in zip(out, logits, strict=True):
                    new.append(int(row.argmax()))
                if step + 1 < max_new_tokens:
                    logits = self.decode([new[-1] for new in out])
        return out

    def _prompts(self, what: str, prompts: Iterable[Any], later: int = 0) -> list[list[int]]:
        listed = _listed(what, prompts)
        if not listed:
            raise UsageError(f"{what} needs at least one prompt.")
        fresh = Sequences(len(listed), self.page_size)
        tokens = self._tokens(what, listed, fresh)
        self._check_lengths(what, fresh, tokens, max(later, 0))
        return tokens

    def _check_lengths(self, what: str, before: Sequences, tokens: list[list[int]], later: int = 0) -> None:
        """Raises UsageError if a sequence becomes too long with these tokens and `later` ones."""
        for i, (length, new) in enumerate(zip(before.lengths, tokens, strict=True)):
            if (total := length + len(new) + later) > self.max_positions:
                raise UsageError(
                    f"{what}: sequence {i} would have {total} tokens; this model takes {self.max_positions} at "
                    "most.",
                    "Give fewer tokens.",
                )

    def _tokens(self, what: str, tokens: Iterable[Any], before: Sequences) -> list[list[int]]:
        """The tokens to append to these sequences, each an int that the model has.  Raises UsageError."""
        listed = _listed(what, tokens)
        before.check_count(len(listed))
        found = []
        for i, given in enumerate(listed):
            new = _listed(what, given, f"sequence {i} is ", "list of tokens")
            if not new:
                raise UsageError(
                    f"{what} needs at least one token for each sequence; sequence {i} has none.",
                    "Leave no list empty.",
                )
            found.append([self._token(f"{what}: token {j} of sequence {i}", value) for j, value in enumerate(new)])
        return found

    def _token(self, what: str, value: Any) -> int:
        token = _whole(value)
        if token is None:
            raise UsageError(f"{what} is {reprlib.repr(value)}, which is no whole number.")
        if not 0 <= token < self.vocab_size:
            raise UsageError(f"{what} is {token}; this model has tokens 0 to {self.vocab_size - 1}.")
        return token

    @property
    def draft(self) -> DraftSession:
        """What guesses further tokens, with sequences of its own.  Raises ArtifactError if there is none."""
        with _turn:
            return DraftSession(self._load(model=self.graphs))

    def _logits(self, asked: Role, sequences: Sequences, tokens: list[list[int]]) -> Logits:
        most = self.graphs.rows_at_once if asked is VERIFY else RAGGED_TOKENS
        found = self._run(sequences, tokens, lambda b, caches: self.graphs.in_parts(asked, b, caches, most))
        self.hidden = found.get(HIDDEN)
        return found[LOGITS]

    def _run(
        self, sequences: Sequences, tokens: list[list[int]], call: Callable[[Batch, list[Any]], Found]
    ) -> Found:
        """Append the tokens and run a graph.  After an error, the sequences are what they were."""
        if self._has_failed:  # MindSpore refuses what failed once: its graphs are bound anew
            self.graphs.cells.clear()
            self.graphs.tensors.clear()
            self.graphs = self._load()
            self.graphs.warm_up()
            self._has_failed = False
        before = list(sequences.lengths)
        try:
            batch = sequences.advance(tokens)
            self._reserve(sequences.num_pages)
            self._has_failed = True
            found = call(batch, self._caches)
            self._has_failed = False
            return found
        except BaseException:
            sequences.take_back(before)
            raise

    def _reserve(self, pages: int) -> None:
        """Room for so many pages; grows by doubling and keeps what is there."""
        if pages > self._num_pages:
            self._num_pages = max(pages, 2 * self._num_pages, 1024 // self.page_size)
            self._caches = _grown(self.graphs, self._caches, self._num_pages)


class DraftSession:
    """A draft's graphs, warmed up, beside the session of its model, with caches of their own.

    draft = session.draft
    draft.begin(1)
    session.prefill([[1, 2, 3]])
    found = draft.run(DRAFT_EXTEND, [[2, 3, 7]], session.hidden)   # each token, and the states of the one before
    """

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        graphs.warm_up()
        self.begin(0)

    def begin(self, count: int) -> None:
        """Start over with so many empty sequences."""
        self._sequences = Sequences(count, self.graphs.page)
        self._caches: list[Any] = []
        self._num_pages = 0

    def run(
        self, asked: Role, tokens: list[list[int]], hidden: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Append tokens to each sequence, of which `hidden` [T, width] are the states of the positions before.
        Logits of each last token, hidden states of all."""
        with _turn:
            batch = self._sequences.advance(tokens)
            if self._sequences.num_pages > self._num_pages:
                self._num_pages = 2 * self._sequences.num_pages
                self._caches = _grown(self.graphs, self._caches, self._num_pages)
            return self.graphs.in_parts(asked, batch, self._caches, hidden=hidden)


def _grown(graphs: Graphs, caches: list[Any], pages: int) -> list[Any]:
    """Caches of so many pages, with what is in these."""
    from mindspore import Tensor

    grown = []
    for i, cache in enumerate(graphs.caches):
        new = np.zeros((pages, graphs.page, *(n or 1 for n in cache.shape[2:])), np.float32)
        if caches:
            old = caches[i].asnumpy()
            new[: len(old)] = old
        grown.append(Tensor.from_numpy(new))
    return grown


def _limits(artifact: Artifact) -> _Limits:
    """From the artifact's own config.json.  Raises ArtifactError if it is another one, or says nothing."""
    try:
        return msgspec.json.decode(artifact.config_bytes(), type=_Limits)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        path = artifact.root / "config.json"
        raise ArtifactError(f"{path}: {e}.", "Convert again with --force.") from None


def _listed(what: str, values: Any, name: str = "", kind: str = "list") -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise UsageError(f"{what}: {name}{reprlib.repr(values)}{', which' * bool(name)} is no {kind}.") from None


def _whole(value: Any) -> int | None:
    """The value as an int if it is one, of Python or of numpy."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None

"""What a rehearsal asks of the server: prompts on both sides of pages and chunks, a cached prefix, several at
once, two answers to one prompt, an abort, log probabilities of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

NEW_TOKENS = 16
ABORTED_AFTER = 4  # tokens
ABORTABLE = 128  # positions of a model whose answers are long enough to be aborted
LONGEST = 300
SEED = 5


@dataclass
class Conversation:
    """A prompt and what the server answered.  `whole`: all that was asked for has come.  `cached`: tokens of the
    prompt that the server took from its cache.  `expect_cached`: how many it could have taken.  `logprobs`: of the
    prompt's tokens but the first, if they were asked for."""

    name: str
    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    cached: int = 0
    expect_cached: int = 0
    whole: bool = True
    logprobs: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer


class Client(Protocol):
    """A server's HTTP interface."""

    def generate(self, ids: list[int], new: int, **sampling: Any) -> list[tuple[list[int], int]]:
        """Each answer's tokens, and how many of the prompt's tokens were cached."""

    def logprobs(self, ids: list[int], new: int) -> tuple[list[int], list[float]]:
        """The answer's tokens, and log probabilities of the prompt's tokens but the first."""

    def abort_after(self, ids: list[int], count: int) -> list[int]:
        """Stream an answer, abort it after so many tokens; the tokens that came."""


@dataclass(frozen=True)
class Scenario:
    """`groups` run one after another; the prompts of one run at once.  Kinds: plain, n (two answers), abort,
    logprobs (of the whole prompt)."""

    groups: list[list[tuple[str, str, list[int]]]]
    longest: int
    page: int
    expects_cache: bool = True  # not with several copies, nor without a cache

    @property
    def num_prompts(self) -> int:
        return sum(map(len, self.groups))

    @property
    def num_calls(self) -> int:
        """Graph calls, about: a step for each token of the answers of a group."""
        return len(self.groups) * (NEW_TOKENS + 2)


def make_scenario(vocab: int, max_positions: int, page: int, most: int = 0, all_logits: bool = True) -> Scenario:
    """Random tokens; lengths are cut to what the model takes.  `most`: so many prompts, 0 for all.  `all_logits`:
    the graphs give log probabilities of prompts."""
    rng = np.random.default_rng(SEED)
    room = max(1, max_positions - NEW_TOKENS - 2)

    def draw(length: int) -> list[int]:
        return [int(t) for t in rng.integers(0, vocab, max(1, min(length, room)))]

    base = draw(page + 22)
    shared = min(page + 12, len(base))
    groups: list[list[tuple[str, str, list[int]]]] = [
        [("5 tokens", "plain", draw(5))],
        [(f"{len(base)} tokens", "plain", base)],
        [("a cached prefix", "plain", (base[:shared] + draw(20))[:room])],
        [("longer than a chunk", "plain", draw(LONGEST))],
        [("1 token", "plain", draw(1))],
        [(f"{n} tokens, at once", "plain", draw(n)) for n in (3, page + 2, 17, page // 2)],
        [("n = 2", "n", draw(33))],
        *([[("aborted", "abort", draw(40))]] if max_positions >= ABORTABLE else []),
        [("a whole page", "plain", draw(page))],
        [("200 tokens", "plain", draw(200))],
    ]
    if all_logits:
        groups.append([("log probabilities", "logprobs", draw(LONGEST)), ("beside them", "plain", draw(9))])
    kept, left = [], most or sum(map(len, groups))
    for group in groups:
        if left > 0:
            kept.append(group[:left])
            left -= len(group)
    longest = max(len(ids) for group in kept for _, _, ids in group)
    return Scenario(kept, longest, page)


def run_scenario(
    scenario: Scenario, client: Client, on_done: Callable[[Conversation], None] = lambda c: None
) -> list[Conversation]:
    """Ask all of it.  Each conversation is handed to `on_done` when it has ended."""
    done: list[Conversation] = []
    seen: list[list[int]] = []

    def ask(item: tuple[str, str, list[int]]) -> list[Conversation]:
        name, kind, ids = item
        if kind == "abort":
            return [Conversation(name, ids, client.abort_after(ids, ABORTED_AFTER), whole=False)]
        if kind == "logprobs":
            tokens, values = client.logprobs(ids, NEW_TOKENS)
            return [Conversation(name, ids, tokens, logprobs=values)]
        expected = max((_common(ids, earlier) for earlier in seen), default=0) // scenario.page * scenario.page
        answers = client.generate(ids, NEW_TOKENS, **({"n": 2} if kind == "n" else {}))
        return [Conversation(name, ids, tokens, cached, expected) for tokens, cached in answers]

    for group in scenario.groups:
        pool = ThreadPoolExecutor(len(group))
        try:
            for found in pool.map(ask, group):
                for conversation in found:
                    done.append(conversation)
                    on_done(conversation)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error the others' answers are not waited for
        seen += [ids for _, _, ids in group]
    return done


def answer_problems(conversations: list[Conversation], scenario: Scenario) -> Iterator[str]:
    """Answers that are too short or too few, and prefixes that were in the cache and were not taken from it."""
    asked = [(name, kind) for group in scenario.groups for name, kind, _ in group]
    for name, kind in dict.fromkeys(asked):
        answers = [c for c in conversations if c.name == name]
        wanted = asked.count((name, kind)) * (2 if kind == "n" else 1)
        if len(answers) != wanted:
            yield f"request {name!r}: {len(answers)} answers of {wanted}"
        for c in answers if kind == "logprobs" else ():
            if len(c.logprobs) != len(c.prompt) - 1:
                yield f"request {name!r}: {len(c.logprobs)} log probabilities for {len(c.prompt)} tokens"
    for c in conversations:
        if len(c.answer) < ABORTED_AFTER or (c.whole and len(c.answer) != NEW_TOKENS):
            yield f"request {c.name!r}: {len(c.answer)} tokens were answered"
        if scenario.expects_cache and c.cached < c.expect_cached:
            yield f"request {c.name!r}: {c.cached} tokens came from the cache, {c.expect_cached} could have come"


def _common(a: list[int], b: list[int]) -> int:
    """Tokens of `a` that `b` begins with, but for the last one: its logits are asked for."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return min(same, len(a) - 1)

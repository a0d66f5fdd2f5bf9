"""How many drafts a target must accept, worked out without a server from its greedy tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.commands import run_python

History = list[tuple[int, Any]]  # tokens that were guessed, each with the draft's own state before it, or None
Guess = tuple[list[float], list[int], Any]  # of the best: probabilities, tokens; the draft's own state
Tree = dict[tuple[int, int], int]  # (a guess, -1 for the root; a token after it): the guess that says so
DEPTH = 18  # of SGLang's table of n-grams: so many tokens of a request are looked up
LOOKED_UP = """
import json, sys
from msconv_runtime.sglang.environment import use_cpu
use_cpu()
from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus
given = json.loads(sys.argv[1])
corpus = NgramCorpus(draft_token_num=given["drafts"], max_bfs_breadth=given["breadth"], capacity=10000000)
found = []
for i, (prompt, answer) in enumerate(given["requests"]):
    out, histogram = 1, [0] * given["drafts"]
    while out < given["new"]:
        seen = prompt + answer[:out]
        corpus.synchronize()
        tokens, mask = corpus.batch_get([str(i)], [seen[-given["depth"]:]], [len(seen)])
        mask = mask.reshape(len(tokens), -1)
        node = accepted = 0
        while True:
            below = [n for n in range(node + 1, len(tokens)) if mask[n][:n].any() and max(
                a for a in range(n) if mask[n][a]) == node and tokens[n] == answer[out + accepted]]
            if not below:
                break
            node, accepted = below[0], accepted + 1
        histogram[accepted] += 1
        corpus.batch_put([seen[-given["depth"]:]])
        out += accepted + 1
    corpus.erase_match_state([str(i)])
    found.append(histogram)
print(json.dumps(found))
"""


def of_ngrams(requests: list[tuple[list[int], list[int]]], new: int, drafts: int, breadth: int) -> Any:
    """By request, asked one after another: how often 0, 1, 2, ... drafts are accepted.  SGLang's own table makes
    them.  `requests`: prompts, each with more of the target's tokens than `new`."""
    given = {"requests": requests, "new": new, "drafts": drafts, "breadth": breadth, "depth": DEPTH}
    done = run_python(LOOKED_UP, json.dumps(given))
    assert done.code == 0, done.stderr[-2000:]
    return [trimmed(histogram) for histogram in json.loads(done.stdout.splitlines()[-1])]


def of_model(draft: Any, ids: list[int], answer: list[int], new: int, steps: int) -> list[int]:
    """The same of a draft model that goes on `steps` tokens.  SGLang gives it the sequence but for its first
    token, as it does for EAGLE."""
    out, histogram = 1, [0] * (steps + 1)
    while out < new:
        seen = ids + answer[:out]
        accepted = 0
        while (
            accepted < steps and _next(draft, (seen + answer[out : out + accepted])[1:]) == answer[out + accepted]
        ):
            accepted += 1
        histogram[accepted] += 1
        out += accepted + 1
    return trimmed(histogram)


def of_branches(
    draft: Any, ids: list[int], answer: list[int], new: int, steps: int, topk: int, drafts: int
) -> list[int]:
    """The same where guesses branch: at each of `steps` places the `topk` best go on, and of all that were seen
    the `drafts` - 1 best are verified."""

    def follow(out: int) -> Tree:
        seen = (ids + answer[:out])[1:]

        def guess(histories: list[History]) -> list[Guess]:
            return [(*row, None) for row in _best(draft, [seen + [t for t, _ in h] for h in histories], topk)]

        return tree_of(guess, steps, topk, drafts - 1)

    return followed(follow, answer, new, steps)


def followed(tree: Callable[[int], Tree], answer: list[int], new: int, steps: int) -> list[int]:
    """How often 0, 1, 2, ... drafts are accepted of the tree that there is after so many answered tokens."""
    out, histogram = 1, [0] * (steps + 1)
    while out < new:
        guesses, accepted, node = tree(out), 0, -1
        while (below := guesses.get((node, answer[out + accepted]))) is not None:
            accepted, node = accepted + 1, below
        histogram[accepted] += 1
        out += accepted + 1
    return trimmed(histogram)


def tree_of(guess: Callable[[list[History]], list[Guess]], steps: int, topk: int, count: int) -> Tree:
    """The `count` best guesses.  As in SGLang a branch goes on from what was put into its place before, whatever
    it is that it follows; the state beside its token is that of what it follows.

    `guess` gets of each branch the guesses in its place, each with a state of the draft's own, if it has one."""
    histories: list[History] = [[] for _ in range(topk)]
    scores, parents = [1.0], [-1]
    found: list[tuple[float, int, int]] = []  # score, parent, token
    for _ in range(steps):
        first = len(found)
        rows = guess(histories[: len(parents)])
        for score, parent, (values, tokens, _own) in zip(scores, parents, rows, strict=True):
            found += [(score * p, parent, token) for p, token in zip(values, tokens, strict=True)]
        parents = sorted(range(first, len(found)), key=lambda i: -found[i][0])[:topk]
        scores = [found[i][0] for i in parents]
        chosen = [(found[i][2], rows[(i - first) // topk][2]) for i in parents]
        histories = [[*h, new] for h, new in zip(histories, chosen, strict=True)]
    best = sorted(range(len(found)), key=lambda i: -found[i][0])[:count]
    return {found[i][1:]: i for i in best}


def _best(model: Any, rows: list[list[int]], topk: int) -> list[tuple[list[float], list[int]]]:
    import torch

    with torch.no_grad():
        values, tokens = model(torch.tensor(rows)).logits[:, -1].softmax(-1).topk(topk)
    return list(zip(values.tolist(), tokens.tolist(), strict=True))


def _next(model: Any, ids: list[int]) -> int:
    import torch

    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def trimmed(histogram: list[int]) -> list[int]:
    """Without zeros at its end, as SGLang gives it."""
    while histogram and not histogram[-1]:
        histogram = histogram[:-1]
    return histogram

"""How many drafts a target must accept, worked out without a server from its greedy tokens."""

from __future__ import annotations

import json
from typing import Any

from tests.commands import run_python

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


def _next(model: Any, ids: list[int]) -> int:
    import torch

    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def trimmed(histogram: list[int]) -> list[int]:
    """Without zeros at its end, as SGLang gives it."""
    while histogram and not histogram[-1]:
        histogram = histogram[:-1]
    return histogram

"""Log probabilities that a server gives of prompts, against transformers' log softmax."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.servers import Server

BOUND = 1e-4  # float32 sums in another order
TOP = 3
NAMED = [5, 9]  # tokens whose log probabilities are asked for by id


def reference(model: Any, ids: list[int]) -> Any:
    """transformers' log softmax after each token, [T, V]."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def ask(server: Server, ids: list[int], start: int, new: int = 1) -> dict[str, Any]:
    """One request, for all that can be asked for of its prompt from `start` on."""
    more = {
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": TOP,
        "token_ids_logprob": NAMED,
    }
    return server.generate(ids, new, **more)


def check(model: Any, ids: list[int], start: int, answer: dict[str, Any]) -> None:
    """All values of an answer that `ask` has got, and that they belong to the tokens of the prompt."""
    meta, rows = answer["meta_info"], reference(model, ids)
    tokens, top, named = (meta[f"input_{what}_logprobs"] for what in ("token", "top", "token_ids"))
    last = model.config.vocab_size - 1  # SGLang says 0 for the last token of a vocabulary
    assert [token for _, token, _ in tokens] == [token if token < last else 0 for token in ids[start:]]
    assert len(tokens) == len(top) == len(named) == len(ids) - start
    assert tokens[0][0] is None  # nothing stands before it, or nothing that was asked for
    for position, (value, _, _), best, listed in list(
        zip(range(start, len(ids)), tokens, top, named, strict=True)
    )[1:]:
        row = rows[position - 1]
        assert abs(value - float(row[ids[position]])) < BOUND
        wanted = row.topk(TOP).values.tolist()
        assert max(abs(v - w) for (v, _, _), w in zip(best, wanted, strict=True)) < BOUND
        assert all(abs(v - float(row[t])) < BOUND for v, t, _ in best)
        assert [t for _, t, _ in listed] == NAMED
        assert all(abs(v - float(row[t])) < BOUND for v, t, _ in listed)
    value, token, _ = meta["output_token_logprobs"][0]
    assert abs(value - float(rows[-1][token])) < BOUND
    assert token == int(rows[-1].argmax())


def completion(server: Server, prompt: Any) -> dict[str, Any]:
    """What evaluation harnesses ask for: a prompt's own log probabilities, and one token more."""
    body = {"model": "any", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    found: dict[str, Any] = json.loads(server.post("/v1/completions", body))
    return found

"""How many drafts a target must accept of what reads its hidden states, worked out without a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.e2e.drafting import Guess, History, Tree, followed, tree_of, trimmed

Rows = NDArray[np.float32]
# Tokens, a vector beside each: the probability of each next token (the target's number of it), and its own vector
Draft = Callable[[list[int], list[Rows]], tuple[dict[int, float], Rows]]


def histogram(draft: Draft, hidden: Rows, ids: list[int], answer: list[int], new: int, steps: int) -> list[int]:
    """How often 0, 1, 2, ... drafts are accepted.  A draft sees each token beside the target's `hidden` states of
    the position before it; from its second step on beside its own."""
    out, found = 1, [0] * (steps + 1)
    while out < new:
        tokens = (ids + answer[:out])[1:]
        given, accepted = list(hidden[: len(tokens)]), 0
        while accepted < steps:
            guesses, own = draft(tokens, given)
            token = max(guesses, key=lambda t: guesses[t])
            if token != answer[out + accepted]:
                break
            accepted += 1
            tokens, given = [*tokens, token], [*given, own]
        found[accepted] += 1
        out += accepted + 1
    return trimmed(found)


def of_branches(
    draft: Draft, hidden: Rows, ids: list[int], answer: list[int], new: int, steps: int, topk: int, drafts: int
) -> list[int]:
    """The same where guesses branch, as `drafting.of_branches` says."""

    def tree(out: int) -> Tree:
        tokens = (ids + answer[:out])[1:]
        given = list(hidden[: len(tokens)])

        def guess(histories: list[History]) -> list[Guess]:
            rows = []
            for history in histories:
                found, own = draft([*tokens, *(t for t, _ in history)], [*given, *(state for _, state in history)])
                best = sorted(found, key=lambda t: -found[t])[:topk]
                rows.append(([found[t] for t in best], best, own))
            return rows

        return tree_of(guess, steps, topk, drafts - 1)

    return followed(tree, answer, new, steps)


def states(target: Any, ids: list[int], layers: list[int]) -> Rows:
    """Of transformers' model: what enters the layers, side by side; without layers, what its head reads."""
    import torch

    with torch.no_grad():
        found = target(torch.tensor([ids]), output_hidden_states=True).hidden_states
    rows: Rows = torch.cat([found[i][0] for i in layers or [-1]], -1).numpy()
    return rows


def eagle3(directory: Path, target: Any) -> Draft:
    """A draft's checkpoint, with its target's embedding."""
    from safetensors.numpy import load_file

    from msconv.verify.eagle3 import Eagle3Reference

    reference, table = Eagle3Reference(directory), target.get_input_embeddings().weight.detach().numpy()
    offsets = load_file(directory / "model.safetensors")["d2t"]
    tokens = offsets + np.arange(len(offsets))

    def run(ids: list[int], given: list[Rows]) -> tuple[dict[int, float], Rows]:
        logits, own = reference.run(table[ids], given)
        return dict(zip(tokens.tolist(), _probabilities(logits[-1]), strict=True)), own[-1]

    return run


def nextn(checkpoint: Path, artifact: Path) -> Draft:
    """A checkpoint's own layer, its weights rounded as the artifact's are."""
    from msconv.verify.mtp import MtpReference
    from msconv.verify.reference import Reference
    from msconv_runtime.artifact import Artifact

    reference = MtpReference(Reference(checkpoint, Artifact(artifact).manifest))

    def run(ids: list[int], given: list[Rows]) -> tuple[dict[int, float], Rows]:
        (trace,) = reference.run([ids], [np.stack(given)])
        return dict(enumerate(_probabilities(trace.logits[-1]))), trace.hidden[-1]

    return run


def _probabilities(logits: Any) -> list[float]:
    values = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    found: list[float] = (values / values.sum()).tolist()
    return found

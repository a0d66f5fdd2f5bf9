"""How many drafts a target must accept of what reads its hidden states, worked out without a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.e2e.drafting import trimmed

Rows = NDArray[np.float32]
Draft = Callable[[list[int], list[Rows]], tuple[int, Rows]]  # tokens, a vector beside each: the next, its own


def histogram(draft: Draft, hidden: Rows, ids: list[int], answer: list[int], new: int, steps: int) -> list[int]:
    """How often 0, 1, 2, ... drafts are accepted.  A draft sees each token beside the target's `hidden` states of
    the position before it; from its second step on beside its own."""
    out, found = 1, [0] * (steps + 1)
    while out < new:
        tokens = (ids + answer[:out])[1:]
        given, accepted = list(hidden[: len(tokens)]), 0
        while accepted < steps:
            token, own = draft(tokens, given)
            if token != answer[out + accepted]:
                break
            accepted += 1
            tokens, given = [*tokens, token], [*given, own]
        found[accepted] += 1
        out += accepted + 1
    return trimmed(found)


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

    def run(ids: list[int], given: list[Rows]) -> tuple[int, Rows]:
        logits, own = reference.run(table[ids], given)
        return int(tokens[logits[-1].argmax()]), own[-1]

    return run


def nextn(checkpoint: Path, artifact: Path) -> Draft:
    """A checkpoint's own layer, its weights rounded as the artifact's are."""
    from msconv.verify.draft_reference import DraftReference
    from msconv.verify.reference import Reference
    from msconv_runtime.artifact import Artifact

    reference = DraftReference(Reference(checkpoint, Artifact(artifact).manifest))

    def run(ids: list[int], given: list[Rows]) -> tuple[int, Rows]:
        (trace,) = reference.run([ids], [np.stack(given)])
        return int(trace.logits[-1].argmax()), trace.hidden[-1]

    return run

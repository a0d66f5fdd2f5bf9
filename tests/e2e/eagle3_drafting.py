"""How many drafts of EAGLE3 a target must accept, worked out without a server from its greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.drafting import trimmed
from tests.eagle3_checkpoints import of_target


def target_tokens(directory: Path) -> Any:
    """The target's token of each of a draft's."""
    from safetensors.numpy import load_file

    offsets = load_file(directory / "model.safetensors")["d2t"]
    return offsets + np.arange(len(offsets))


def of_eagle3(
    draft: Any,
    tokens: Any,
    target: Any,
    layers: list[int],
    ids: list[int],
    answer: list[int],
    new: int,
    steps: int,
) -> list[int]:
    """How often 0, 1, 2, ... drafts are accepted.  The draft sees each token beside the target's streams before
    it; from its second step on beside its own state.  `tokens`: the target's, by the draft's."""
    table, streams = of_target(target, ids + answer, layers)
    out, histogram = 1, [0] * (steps + 1)
    while out < new:
        seen, accepted = len(ids) + out, 0
        hidden = list(streams[: seen - 1].numpy())
        embedded = list(table[1:seen].numpy())
        while accepted < steps:
            logits, own = draft.run(np.stack(embedded), hidden)
            token = int(tokens[logits[-1].argmax()])
            if token != answer[out + accepted]:
                break
            accepted += 1
            hidden.append(own[-1])
            embedded.append(target.get_input_embeddings().weight[token].detach().numpy())
        histogram[accepted] += 1
        out += accepted + 1
    return trimmed(histogram)

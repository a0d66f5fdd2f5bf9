"""Hidden states between a model and what drafts for it: the model gives them, SGLang keeps them, the draft takes
them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.runtime_context import get_model

from ..artifact import D2T, Artifact
from ..artifact.weights import RankWeights
from ..draft_kinds import DRAFT_KINDS, OF_LAYERS
from ..draft_kinds.eagle3 import EAGLE3
from ..errors import ArtifactError
from ..graphs import Graphs, Outputs
from ..paging import Batch
from ..roles import DRAFT_DECODE, DRAFT_EXTEND, HIDDEN, LOGITS
from . import drafts


def find_model(artifact: Artifact, architecture: str) -> Artifact | None:
    """The artifact of the model for which this one drafts, from its hidden states; None if it does not."""
    if architecture.endswith(tuple(kind.suffix for kind in OF_LAYERS.values())):
        return artifact
    return Artifact(get_model().model_path) if artifact.is_draft else None


def target_tokens(artifact: Artifact) -> torch.Tensor | None:
    """The target's token of each that a draft scores; None if they are the same.  Raises ArtifactError for one
    that there is not."""
    weights = artifact.manifest.weights
    if weights is None or D2T not in {t.name for t in weights.tensors}:
        return None
    tokens = RankWeights(artifact, 0).raw(D2T).astype(np.int64)
    tokens += np.arange(len(tokens))
    size = int(json.loads(artifact.config_bytes())["vocab_size"])
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= size:
        raise ArtifactError(
            f"{artifact.root}: {D2T} gives tokens from {tokens.min()} to {tokens.max()}; its target has {size}.",
            "Download the draft again, and convert it.",
        )
    return torch.from_numpy(tokens)


def check_captured(artifact: Artifact, layer_ids: list[int] | None) -> None:
    """Raises ArtifactError unless the graphs give the residual streams that SGLang says its draft reads."""
    layers = json.loads(artifact.config_bytes())["num_hidden_layers"]
    draft = artifact.manifest.draft
    given = draft.layers if draft else []
    kind = DRAFT_KINDS[draft.kind] if draft and given else EAGLE3
    if given != (wanted := kind.captured(layers, layer_ids)):
        raise ArtifactError(
            f"{artifact.root}: its graphs give hidden states of the layers {given}, the draft reads {wanted}.",
            f"`msconv compile {artifact.root} --draft DRAFT` makes graphs for it.",
        )


def as_output(found: Outputs, device: Any) -> LogitsProcessorOutput:
    """What graphs gave, as SGLang takes it."""
    tensors = {name: torch.from_numpy(values).to(device) for name, values in found.items()}
    return LogitsProcessorOutput(next_token_logits=tensors[LOGITS], hidden_states=tensors.get(HIDDEN))


def of_last(found: Outputs, batch: Batch) -> Outputs:
    """The same with hidden states [B, ..] of each sequence's last token."""
    return found | {HIDDEN: found[HIDDEN][np.cumsum(batch.q_lens) - 1]}


def of_draft(graphs: Graphs, batch: Batch, forward_batch: Any, caches: list[Any], device: Any) -> Any:
    """SGLang's LogitsProcessorOutput of a draft: logits and hidden states [B, ..] of each sequence's last token;
    after a verification [B * k, ..], see `drafts.run`."""
    info, mode = forward_batch.spec_info, forward_batch.forward_mode
    is_after = mode.is_draft_extend_v2()  # which `is_extend` leaves out
    role = DRAFT_EXTEND if is_after or mode.is_extend() else DRAFT_DECODE
    counts = info.num_accept_tokens.cpu().numpy() if is_after else None
    given = info.hidden_states.float().cpu().numpy()
    return as_output(drafts.run(graphs, role, batch, caches, given, counts), device)

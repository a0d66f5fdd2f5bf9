"""The layer of multi-token prediction of a checkpoint: whole, absent, or half there."""

from __future__ import annotations

from dataclasses import replace

from msconv_runtime.artifact import Draft
from msconv_runtime.errors import CheckpointError

from ..families import DecoderConfig
from ..layout.model import expand
from ..layout.names import listing
from .directory import Checkpoint


def with_draft(checkpoint: Checkpoint, is_wanted: bool) -> Checkpoint:
    """The checkpoint with the layer that guesses further tokens, if it is wanted and there.  Without headers, what
    the configuration promises is taken to be there.  Raises CheckpointError if half of the layer is there."""
    config = checkpoint.config.with_draft()
    if not is_wanted or not config.drafts:
        return checkpoint
    if checkpoint.tensors and not _is_whole(checkpoint, config):
        return replace(checkpoint, notes=(*checkpoint.notes, _absent(config)))
    return replace(checkpoint, config=config)


def draft_of(config: DecoderConfig) -> Draft | None:
    """What an artifact's manifest says of it."""
    return Draft(config.own_draft.name) if config.drafts and config.own_draft else None


def _is_whole(checkpoint: Checkpoint, config: DecoderConfig) -> bool:
    prefix = f"model.layers.{config.layers}."
    found = {name for name in checkpoint.tensors if name.startswith(prefix)}
    needed = {
        source
        for output in expand(checkpoint.family.table, config.sizes())
        if output.name.startswith(prefix) and not output.rule.optional
        for _, source in output.sources
    }
    if not found:
        return False
    if missing := sorted(needed - found):
        raise CheckpointError(
            f"{checkpoint.root}: half of the layer of multi-token prediction is there: {prefix}* has {len(found)} "
            f"tensors, and lacks {len(missing)}:\n{listing(missing)}",
            "`--no-drafts` leaves the layer out; without it, speculative decoding needs another draft.",
        )
    return True


def _absent(config: DecoderConfig) -> str:
    return (
        "config.json promises a layer of multi-token prediction (num_nextn_predict_layers "
        f"{config.mtp_layers}), and the checkpoint has none: the artifact will have no draft of its own."
    )

"""What a proof takes of memory, planned before it begins: what the reference must hold, and what ranks may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import NoReturn

from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import ResourceError, UsageError
from msconv_runtime.units import human_bytes

from .lockstep import HELD_BYTES, KEEP_BYTES, Lockstep
from .reference import KEEP_BYTES as REFERENCE_BYTES
from .reference import Reference, parts_bytes
from .scenario import Candidate

FLOAT32 = 4
LIBRARIES_BYTES = 1 << 30  # torch, transformers and MindSpore with what they allocate; measured 0.8 GiB
WIDTHS = 24  # values a token and unit of hidden size that a layer's activations take, scores included
RANK_WIDTHS = 12  # the same of each rank; four of Qwen3-8B took some 7 beyond all else


def held_bytes(reference: Reference, artifact: Artifact, tokens: int, max_memory: int | None) -> int:
    """What a layer's weights of all ranks may take together.  `tokens`: of all sequences.  Raises ResourceError if
    `max_memory` cannot hold the least that is needed."""
    if max_memory is None:
        return HELD_BYTES
    part, largest = _largest_part(reference)
    config = reference.model.config
    a_layer = 0 if reference.kept.is_there else 3 if reference.keeps_streams else 2
    norms = a_layer * config.num_hidden_layers
    fixed = besides_bytes(tokens, config.hidden_size, config.vocab_size, norms)
    widest = max(FLOAT32 * prod(t.shape) for t in artifact.weights.tensors)
    size = FLOAT32 * sum(prod(t.shape) for t in artifact.weights.tensors) * artifact.tp
    ranks = size if size <= 2 * KEEP_BYTES else widest
    need = fixed + max(largest, ranks)
    if need > max_memory:
        raise ResourceError(
            f"--max-memory {max_memory:,} bytes is too little: {part} takes {human_bytes(largest)} in float32, "
            f"the ranks' weights at least {human_bytes(ranks)}, all else {human_bytes(fixed)}.",
            f"Try --max-memory {-(-need >> 20)}M.",
        )
    return min(HELD_BYTES, max_memory - fixed - widest)


def besides_bytes(tokens: int, hidden: int, vocab: int, norms: int) -> int:
    """What a proof takes besides weights.  `norms`: outputs of that many are held for all tokens."""
    return LIBRARIES_BYTES + tokens * FLOAT32 * ((WIDTHS + norms) * hidden + 2 * vocab)


def ranks_bytes(tokens: int, hidden: int, tp: int, cached: int) -> int:
    """What ranks take besides weights.  `cached`: values a token of one rank's caches, all layers."""
    return tp * tokens * FLOAT32 * (RANK_WIDTHS * hidden + cached)


def most_bytes(parts: Sequence[int], ranks: Sequence[int], besides: int) -> int:
    """At most, without a ceiling.  Bytes in float32 of the embedding, each layer and the head: `parts` of
    transformers' model, `ranks` of all ranks' weights together.  `besides`: what `besides_bytes` gives."""
    reference = sum(parts) if sum(parts) <= REFERENCE_BYTES else max(parts)
    held = sum(ranks) if sum(ranks) <= 2 * KEEP_BYTES else min(HELD_BYTES, max(ranks))
    return besides + (reference + held if reference == sum(parts) else max(reference, held))


def limited(make: Callable[[], Candidate], held: int) -> Candidate:
    """A candidate whose layers hold no more than `held` bytes."""
    one = make()
    if isinstance(one, Lockstep):
        one.held.arena.limit_bytes = held
    return one


def refuse_ceiling(root: Path, max_memory: int) -> NoReturn:
    """Raises UsageError: only proofs by values are planned."""
    raise UsageError(
        f"{root}: --max-memory {max_memory:,}: the memory of a proof of int8, or of a draft by itself, is not "
        "planned.",
        "Leave --max-memory out.",
    )


def _largest_part(reference: Reference) -> tuple[str, int]:
    """What is in memory at a time, and its bytes: all of a small model, else a layer, the embedding or the head,
    without experts, which come one at a time."""
    sizes = parts_bytes(reference.model)
    if reference.keeps_all:
        return "transformers' model", sum(sizes.values())
    part = max(sizes, key=sizes.__getitem__)
    return f"{part} of transformers' model", sizes[part]

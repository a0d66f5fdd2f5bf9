"""Sources that are left out, and whose bytes are looked at first: what would be lost with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from msconv_runtime.dtypes import DTYPES
from msconv_runtime.errors import CheckpointError

from ..layout.names import fold, shorten
from ..layout.plan import Plan
from ..quant.record import LeftOut
from .source import Source

BLOCK_BYTES = 4 << 20
SOME = 20  # lines of a message
HEAD = "lm_head.weight"
DRAFTS_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")  # of a layer after the last

Seen = Callable[[bytearray], object]  # takes the bytes of the tensor that is left out, in order


def is_lost(plan: Plan, source: Source, entry: LeftOut, seen: Seen = lambda data: None) -> bool:
    """Whether leaving it out would lose something: it should hold the same bytes as another, or zeros."""
    info = plan.sources[entry.name]
    twin = plan.sources[entry.twin] if entry.twin else None
    lost = twin is not None and (info.dtype, info.shape) != (twin.dtype, twin.shape)
    for begin in range(0, info.nbytes, BLOCK_BYTES):
        n = min(BLOCK_BYTES, info.nbytes - begin)
        found = bytearray(n)
        source.read(info, begin, memoryview(found))
        seen(found)
        if twin is not None and not lost:
            wanted = bytearray(n)
            source.read(twin, begin, memoryview(wanted))
            lost = found != wanted
        elif twin is None:
            lost = lost or bool((np.frombuffer(found, DTYPES[info.dtype].numpy) != 0).any())  # -0.0 is zero
    return lost


def difference(entry: LeftOut) -> tuple[str, str]:
    """What is said of one that differs from its twin, and what to do."""
    if entry.name == HEAD:
        return (
            f"the configuration ties it to {entry.twin}, but its values are different",
            'Set "tie_word_embeddings": false in config.json if the head is meant to be its own.',
        )
    if entry.name.endswith(DRAFTS_COPIES):
        return (
            f"differs from {entry.twin}, which a server gives its draft too",
            "`--no-drafts --force` leaves the layer of multi-token prediction out.",
        )
    return (
        f"differs from {shorten(entry.twin)}: they share their input",
        "Quantise the model again: one product serves both, and it has one input scale.",
    )


def refuse_lost(entries: Sequence[LeftOut]) -> None:
    """Raises CheckpointError that names them all."""
    if not entries:
        return
    lines: list[str] = []
    zeros: dict[str, list[str]] = {}
    hint = "Quantise the model with symmetric weights: no graph has an offset for them."
    for entry in entries:
        if not entry.twin:
            zeros.setdefault(entry.reason, []).append(entry.name)
        else:
            words, hint = difference(entry)
            lines.append(f"{shorten(entry.name)}: {words}.")
    for reason, names in zeros.items():
        lines += [f"{name}: is not zero; it would be left out ({reason})." for name, _ in fold(names)]
    more = [f"... and {len(lines) - SOME} more."] if len(lines) > SOME else []
    raise CheckpointError("\n".join([*lines[:SOME], *more]), hint)

"""A CPU: what graphs are tried on, and served on where there is no NPU."""

from __future__ import annotations

from .record import Paging, Target

CPU = Target(
    name="cpu",
    kind="cpu",
    dtype="float32",
    graphs=(("prefill", ""), ("decode", ""), ("verify", ""), ("mixed", "compiled"), ("verify", "compiled")),
    draft_graphs=(("draft_extend", ""), ("draft_decode", ""), ("draft_extend", "compiled")),
    operations="cpu",
    paging=Paging(slots=1),
    epsilon=2**-24,
    rounds_weights=False,
    prefill_reads_cache=True,
    decode_min_sequences=3,  # it multiplies the other way round; measured at the shape of Qwen3-0.6B
)

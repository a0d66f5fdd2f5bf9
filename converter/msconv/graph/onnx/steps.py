"""What a graph takes and gives, and what its layers share: rotation and masks.

Names are those that optimum and onnxruntime-genai use.  `attention_mask` [B, T] says which tokens are there, 1 or
0: a row of the cache whose entry is 0 is seen by nobody, wherever it lies.  A token's position is how many are
there before it: `position_ids` [B, S] of new ones must be that too.
"""

from __future__ import annotations

from dataclasses import dataclass

from msconv_runtime.artifact import GraphInput, GraphOutput
from msconv_runtime.roles import LOGITS

from ...families.config import DecoderConfig
from ..rope import frequencies
from ..spec import Fixed, Local
from .builder import FLOAT, Builder
from .forms import Form

TOKENS = ("batch", "tokens")
ALL_TOKENS = ("batch", "total_tokens")


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


def cache_sizes(config: DecoderConfig) -> list[tuple[int, int]]:
    """(heads, width) of a layer's two caches.  A latent row comes in two halves: whoever keeps it knows a key and
    a value."""
    if mla := config.mla:
        return [(1, mla.latent - mla.latent // 2), (1, mla.latent // 2)]
    return [(config.kv_heads, config.head_dim)] * 2


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs, with the names of their dimensions."""

    inputs: list[tuple[GraphInput, tuple[str, ...]]]
    outputs: list[tuple[GraphOutput, tuple[str, ...]]]


def new_tokens(local: Local, fixed: Fixed) -> int:
    """Of each sequence, in one call of a graph of fixed shapes."""
    return 1 if local.role.new_tokens == "one" else fixed.tokens


def signature(local: Local) -> Signature:
    """Dimensions are dynamic unless they are fixed.  Then caches go in with all their places, and only the rows of
    new tokens come out."""
    config, fixed = local.config, local.fixed
    batch = new = past = total = kept = None
    if fixed is not None:
        batch, new, past = fixed.batch, new_tokens(local, fixed), fixed.context
        total, kept = past + new, new
    tokens, everything = [batch, new], [batch, total]
    inputs: list[tuple[GraphInput, tuple[str, ...]]] = [
        (GraphInput("input_ids", "int64", tokens), TOKENS),
        (GraphInput("attention_mask", "int64", everything, "mask"), ALL_TOKENS),
        (GraphInput("position_ids", "int64", tokens), TOKENS),
    ]
    outputs: list[tuple[GraphOutput, tuple[str, ...]]] = [
        (GraphOutput(LOGITS, "float32", [batch, new, config.vocab]), (*TOKENS, "vocabulary"))
    ]
    for layer in range(config.layers):
        for name, (heads, width) in zip(past_names(layer), cache_sizes(config), strict=True):
            shape = [batch, heads, past, width]
            inputs.append(
                (GraphInput(name, "float32", shape, "cache"), ("batch", "heads", "past_tokens", "width"))
            )
        for name, (heads, width) in zip(present_names(layer), cache_sizes(config), strict=True):
            shape = [batch, heads, kept, width]
            outputs.append((GraphOutput(name, "float32", shape), ("batch", "heads", "total_tokens", "width")))
    return Signature(inputs, outputs)


@dataclass(frozen=True)
class Step:
    """Values that all layers use: cos and sin [B, S, D/2], and for each window a mask [B, 1, S, T] that is added
    to scores."""

    cos: str
    sin: str
    masks: dict[int | None, str]


def begin(b: Builder, form: Form, local: Local) -> Step:
    config = local.config
    inverse, factor = frequencies(config.rope, config.rope_dim)
    positions = b.op("Unsqueeze", b.op("Cast", "position_ids", to=FLOAT), b.whole([2]))
    angles = b.op("Mul", positions, b.real(inverse))
    cos, sin = b.op("Cos", angles), b.op("Sin", angles)
    if factor != 1.0:
        cos, sin = (b.op("Mul", x, b.real(factor)) for x in (cos, sin))
    return Step(cos, sin, _masks(b, form, local.windows))


def _masks(b: Builder, form: Form, windows: tuple[int | None, ...]) -> dict[int | None, str]:
    there = b.op("Greater", "attention_mask", b.whole(0))
    there = b.op("Unsqueeze", there, b.whole([1, 2]))
    keys = b.op("Sub", b.op("CumSum", "attention_mask", b.whole(1)), b.whole(1))
    keys = b.op("Unsqueeze", keys, b.whole([1, 2]))  # [B, 1, 1, T]
    queries = b.op("Unsqueeze", "position_ids", b.whole([1, 3]))  # [B, 1, S, 1]
    before = b.op("And", there, b.op("LessOrEqual", keys, queries))

    def mask(window: int | None) -> str:
        seen = before
        if window is not None:
            seen = b.op("And", before, b.op("Greater", keys, b.op("Sub", queries, b.whole(window))))
        return b.op("Where", seen, b.real(0.0), b.real(form.hidden_score))

    return {window: mask(window) for window in windows}

"""A decoder's configuration as one checked value, and what a family says of reading its config.json."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from msconv_runtime.draft_kinds import OF_CHECKPOINTS, DraftKind

from ..layout.model import Sizes, Table
from ..layout.names import shorten
from ..quant import WeightFormat
from .attention import Attention
from .keys import COMMON, Keys

MAX_LAYERS = 4096
MAX_EXPERTS = 65536
ZERO_IN_FLOAT32 = 2.0**-150  # and all below it
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding.  `kind`: default, linear or yarn, with the published parameter names."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture of experts.  `layers`: whether each layer has experts or a dense MLP.  `scoring`: softmax over all
    experts, or sigmoid with a correction bias that takes part in the choice only.  The best `top_k` are taken
    from the best `top_groups` of `groups`; their weights are divided by their sum if `normalise`, then times
    `scale`."""

    layers: tuple[bool, ...]
    experts: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention.  `q_lora` 0: queries come straight from the hidden state.  A head's query and
    key are `nope` values without and `rope` values with rotation; the cache keeps `kv_lora` + `rope` a token."""

    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    v_dim: int
    interleaved: bool = True

    @property
    def latent(self) -> int:
        return self.kv_lora + self.rope


@dataclass(frozen=True, slots=True)
class DraftFor:
    """Of a draft that is a checkpoint of its own: what it says of its target.  `vocab`: how many tokens that has;
    the draft may score some of them.  It reads `captured` residual streams, side by side.  `layers`: those of the
    target that make the streams, as config.json numbers them; () for the usual ones."""

    kind: DraftKind
    vocab: int
    captured: int = 1
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only model.  Counts and widths are those of the whole model, before any cut.

    `head_dim`: of queries and keys.  `formats`: in which matrices may be stored besides plain.
    `mtp_layers`: layers after the last, of the kind `own_draft`; `drafts`: how many of them are taken.
    `windows`: of each layer's attention, () for none.  `output_bias`: of attention; None if it is there where
    `attention_bias` is.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    max_positions: int
    tied: bool
    attention_bias: bool
    rope: Rope
    dtype: str = ""
    moe: Moe | None = None
    mla: Mla | None = None
    formats: tuple[WeightFormat, ...] = ()
    mtp_layers: int = 0
    qk_norm: bool = True
    windows: tuple[int | None, ...] = ()
    output_bias: bool | None = None
    own_draft: DraftKind | None = None
    drafts_for: DraftFor | None = None
    drafts: int = 0

    def with_draft(self) -> DecoderConfig:
        """The same with the layer that guesses one token more, if it promises one.  Servers use no further one."""
        return replace(self, drafts=min(self.mtp_layers, 1))

    @property
    def draft_kind(self) -> DraftKind | None:
        """Of its graphs that draft: with a layer of its own, or for another model."""
        return self.drafts_for.kind if self.drafts_for else self.own_draft

    @property
    def rope_dim(self) -> int:
        return self.mla.rope if self.mla else self.head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(head_dim); with latent attention times the square of yarn's mscale_all_dim term."""
        scale: float = self.head_dim**-0.5
        if self.mla and self.rope.mscale_all_dim and self.rope.factor > 1:
            scale *= (0.1 * self.rope.mscale_all_dim * math.log(self.rope.factor) + 1.0) ** 2
        return scale

    def attention(self, layer: int) -> Attention:
        """What a layer's attention computes, all ranks together."""
        return Attention(
            kind="heads" if self.mla is None else "latent",
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.softmax_scale,
            window=self.windows[layer] if self.windows else None,
            qk_norm=self.qk_norm and self.mla is None,
            bias=self.attention_bias,
            output_bias=self.attention_bias if self.output_bias is None else self.output_bias,
        )

    def has_experts(self, layer: int) -> bool:
        """Layers after the last have them where any has."""
        return self.moe is not None and (layer >= self.layers or self.moe.layers[layer])

    def sizes(self) -> Sizes:
        dims = {
            "hidden": self.hidden,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "ffn": self.ffn,
            "vocab": self.vocab,
            "mtp_layers": self.mtp_layers,
            "both_hidden": 2 * self.hidden,
        }
        traits = {"tied" if self.tied else "untied"}
        if self.attention_bias:
            traits.add("attention_bias")
        if self.mtp_layers:
            traits.add("mtp")
        if self.drafts_for:
            dims |= {"streams": self.drafts_for.captured * self.hidden, "both": 2 * self.hidden}
        if self.drafts:
            traits.add("draft")
        kinds: tuple[frozenset[str], ...] = ()
        if moe := self.moe:
            dims |= {"experts": moe.experts, "expert_ffn": moe.ffn, "shared_ffn": moe.shared_ffn}
            sparse = frozenset({"moe_layer"} | ({"shared_expert"} if moe.shared_ffn else set()))
            kinds = tuple(sparse if has else frozenset({"dense_layer"}) for has in moe.layers)
            kinds += (sparse | {"draft_layer"},) * self.drafts
        if mla := self.mla:
            dims |= {
                "q_lora": mla.q_lora,
                "kv_lora": mla.kv_lora,
                "latent": mla.latent,
                "nope": mla.nope,
                "v_dim": mla.v_dim,
                "kv_b_head": mla.nope + mla.v_dim,
                "kv_b": self.heads * (mla.nope + mla.v_dim),
                "o": self.heads * mla.v_dim,
                "pairs": mla.rope if mla.interleaved else 0,
            }
            traits.add("q_lora" if mla.q_lora else "no_q_lora")
        return Sizes(dims, self.layers, frozenset(traits), kinds, self.formats, self.drafts)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: its name (`model_type`), its architecture's class name, its weight table, and how what only
    it has is read from config.json (values of DecoderConfig by name).

    `keys`: those of config.json that are known.  `aliases`: other values of `model_type` under which the same
    computation is published; the reference reads them as `name`.  `windows_by_layer`: sliding windows begin at
    `max_window_layers`, in all layers otherwise.  `other_names`: beginnings of names as some checkpoints have
    them, and as the table has them.
    """

    name: str
    architecture: str
    table: Table
    read: Callable[[Reader, int], dict[str, Any]] | None = None
    keys: Keys = COMMON
    aliases: tuple[str, ...] = ()
    windows_by_layer: bool = False
    other_names: tuple[tuple[str, str], ...] = ()

    @property
    def is_draft(self) -> bool:
        """Whether it drafts for another model; its `model_type` alone does not tell it."""
        return self.name in OF_CHECKPOINTS


class Reader:
    """Typed access to a JSON object that collects what is wrong with it."""

    def __init__(self, raw: dict[str, object], prefix: str = "") -> None:
        self.raw, self.prefix, self.problems = raw, prefix, list[str]()

    def whole(self, key: str, default: int | None = None, most: int = 1 << 40) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.problems.append(f"{self.prefix}{key} = {show(value)}: a whole number from 1 to {most} is needed")
            return default or 1
        return value

    def count(self, key: str, default: int = 0, most: int = 1 << 40) -> int:
        """A whole number that may be 0 or null."""
        if key not in self.raw:
            return default
        value = self.raw[key]
        return 0 if value is None or (type(value) is int and value == 0) else self.whole(key, most=most)

    def same(self, *keys: str) -> None:
        """Keys that are names of one value."""
        values = [(key, self.raw[key]) for key in keys if self.raw.get(key) is not None]
        if any(value != values[0][1] for _, value in values):
            named = " and ".join(f"{key} = {show(value)}" for key, value in values)
            self.problems.append(f"{self.prefix}{named}: only one can hold")

    def needs(self, *keys: str) -> None:
        """Keys whose absence has no one meaning."""
        self.problems += [f"{self.prefix}{key} is not there" for key in keys if key not in self.raw]

    def one_of(self, key: str, supported: str) -> None:
        """A key with one supported value, which is also what its absence means."""
        if self.raw.get(key, supported) != supported:
            self.problems.append(f"{self.prefix}{key} = {show(self.raw[key])}: only {supported} is supported")

    def real(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self.problems.append(f"{self.prefix}{key} = {show(value)}: a number above 0 is needed")
            return default or 1.0
        if not ZERO_IN_FLOAT32 < value <= LARGEST_FLOAT32:
            text = "graphs compute in float32, which holds numbers above 0 from 1.4e-45 to 3.4e+38"
            self.problems.append(f"{self.prefix}{key} = {show(value)}: {text}")
            return default or 1.0
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{self.prefix}{key} = {show(value)}: true or false is needed")
            return default
        return value


def show(value: object) -> str:
    """A value of a configuration, printable and short."""
    return shorten(reprlib.repr(value), 80)

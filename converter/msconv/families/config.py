"""Reading config.json, in the published spelling and in transformers 5's, into one checked value.

Whatever a graph would have to obey and does not is an error here, never ignored.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from msconv_runtime.errors import CheckpointError

from ..layout.model import Sizes, Table
from ..layout.names import shorten
from ..quant import WeightFormat, read_formats
from .attention import Attention

MAX_LAYERS = 4096
MAX_EXPERTS = 65536


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
class DecoderConfig:
    """A decoder-only model.  Counts and widths are those of the whole model, before any cut.

    `head_dim`: of queries and keys.  `formats`: in which matrices may be stored besides plain.
    `mtp_layers`: layers after the last, for multi-token prediction.  `windows`: of each layer's attention, () for
    none.  `output_bias`: of attention; None if it is there where `attention_bias` is.
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
        return self.moe is not None and self.moe.layers[layer]

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
        }
        traits = {"tied" if self.tied else "untied"}
        if self.attention_bias:
            traits.add("attention_bias")
        if self.mtp_layers:
            traits.add("mtp")
        kinds: tuple[frozenset[str], ...] = ()
        if moe := self.moe:
            dims |= {"experts": moe.experts, "expert_ffn": moe.ffn, "shared_ffn": moe.shared_ffn}
            sparse = frozenset({"moe_layer"} | ({"shared_expert"} if moe.shared_ffn else set()))
            kinds = tuple(sparse if has else frozenset({"dense_layer"}) for has in moe.layers)
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
        return Sizes(dims, self.layers, frozenset(traits), kinds, self.formats)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: its name (`model_type`), its architecture's class name, its weight table, and how what only
    it has is read from config.json (values of DecoderConfig by name)."""

    name: str
    architecture: str
    table: Table
    read: Callable[[Reader, int], dict[str, Any]] | None = None


class Reader:
    """Typed access to a JSON object that collects what is wrong with it."""

    def __init__(self, raw: dict[str, object], prefix: str = "") -> None:
        self.raw, self.prefix, self.problems = raw, prefix, list[str]()

    def whole(self, key: str, default: int | None = None, most: int = 1 << 40) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.problems.append(f"{self.prefix}{key} = {_show(value)}: a whole number from 1 to {most} is needed")
            return default or 1
        return value

    def count(self, key: str, default: int = 0, most: int = 1 << 40) -> int:
        """A whole number that may be 0 or null."""
        if key not in self.raw:
            return default
        value = self.raw[key]
        return 0 if value is None or (type(value) is int and value == 0) else self.whole(key, most=most)

    def needs(self, *keys: str) -> None:
        """Keys whose absence has no one meaning."""
        self.problems += [f"{self.prefix}{key} is not there" for key in keys if key not in self.raw]

    def one_of(self, key: str, supported: str) -> None:
        """A key with one supported value, which is also what its absence means."""
        if self.raw.get(key, supported) != supported:
            self.problems.append(f"{self.prefix}{key} = {_show(self.raw[key])}: only {supported} is supported")

    def real(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            self.problems.append(f"{self.prefix}{key} = {_show(value)}: a number above 0 is needed")
            return default or 1.0
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{self.prefix}{key} = {_show(value)}: true or false is needed")
            return default
        return value


def read_config(raw: dict[str, object], family: Family, where: str) -> DecoderConfig:
    """Check and convert a config.json.  Raises CheckpointError listing all that cannot be obeyed."""
    r = Reader(raw)
    hidden, heads = r.whole("hidden_size"), r.whole("num_attention_heads")
    kv_heads = r.whole("num_key_value_heads", heads)
    head_dim = r.whole("head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        r.problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2 and "qk_rope_head_dim" not in raw:
        r.problems.append(f"head_dim {head_dim} is odd: rotary embedding needs pairs")
    r.one_of("hidden_act", "silu")
    if raw.get("use_sliding_window"):
        r.problems.append("use_sliding_window is true: sliding windows are not supported")
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and any(k != "full_attention" for k in kinds):
        r.problems.append("layer_types has layers that are not full_attention: not supported")
    max_positions = r.whole("max_position_embeddings")
    layers = r.whole("num_hidden_layers", most=MAX_LAYERS)
    config = DecoderConfig(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=r.whole("intermediate_size"),
        vocab=r.whole("vocab_size"),
        eps=r.real("rms_norm_eps", 1e-6),
        max_positions=max_positions,
        tied=r.flag("tie_word_embeddings", False),
        attention_bias=r.flag("attention_bias", False),
        rope=_rope(raw, r, max_positions),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or ""),
        formats=read_formats(raw, r.problems),
    )
    if family.read is not None:
        config = replace(config, **family.read(r, layers))
    if r.problems:
        raise CheckpointError(
            f"{where}: this {family.name} configuration cannot be used:\n"
            + "\n".join(f"  {p}." for p in dict.fromkeys(r.problems))
        )
    return config


def _rope(raw: dict[str, object], r: Reader, max_positions: int) -> Rope:
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    values: dict[str, object] = {}
    for name, spelled in (("rope_scaling", old), ("rope_parameters", new)):
        if isinstance(spelled, dict):
            values |= spelled
        elif spelled is not None:
            r.problems.append(f"{name} = {_show(spelled)}: an object is needed")
    p = Reader({"rope_theta": raw.get("rope_theta"), **values}, "rope: ")
    kind = values.get("rope_type") or values.get("type") or "default"
    theta = p.real("rope_theta", 10000.0)
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        p.problems.append("rope: partial_rotary_factor other than 1 is not supported")
    rope = Rope(theta)
    if kind == "linear":
        rope = Rope(theta, "linear", factor=p.real("factor"))
    elif kind == "yarn":
        original = p.whole("original_max_position_embeddings", max_positions)
        attention = values.get("attention_factor")
        rope = Rope(
            theta,
            "yarn",
            factor=p.real("factor", max_positions / original),
            original_max_positions=original,
            attention_factor=p.real("attention_factor") if attention is not None else None,
            beta_fast=p.real("beta_fast", 32.0),
            beta_slow=p.real("beta_slow", 1.0),
            mscale=p.real("mscale", 0.0) if values.get("mscale") else 0.0,
            mscale_all_dim=p.real("mscale_all_dim", 0.0) if values.get("mscale_all_dim") else 0.0,
            truncate=p.flag("truncate", True),
        )
    elif kind != "default":
        p.problems.append(f"rope: rope_type {_show(kind)} is not supported (default, linear, yarn are)")
    r.problems += p.problems
    return rope


def _show(value: object) -> str:
    return shorten(reprlib.repr(value), 80)

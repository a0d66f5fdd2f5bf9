"""Reading config.json, in the published spelling and in transformers 5's, into one checked value.

Whatever a graph would have to obey and does not is an error here, never ignored; so is a key that is on no list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from msconv_runtime.errors import CheckpointError, UsageError

from ..layout.names import shorten
from ..quant import WeightFormat, read_formats
from ..quant.modelslim import DESCRIPTION
from ..quant.unsupported import INSTEAD
from .config import MAX_LAYERS, DecoderConfig, Family, Reader, Rope, show
from .keys import ROPE, ROPE_OTHERS, Keys, Unknown, check, joined

KEYS_NAMED = 60  # in one message
QUANTISED = ("quantization_config", DESCRIPTION)  # how problems begin that are of weights' formats


def read_config(raw: dict[str, object], family: Family, where: str, harmless: Iterable[str] = ()) -> DecoderConfig:
    """Check and convert a config.json.  `harmless`: keys on no list that a person says change nothing, nested ones
    as `rope_scaling.key`.  Raises CheckpointError listing all that cannot be obeyed, UsageError for a key said to
    be harmless that is not there or is obeyed."""
    r = Reader(raw)
    hidden, heads = r.whole("hidden_size"), r.whole("num_attention_heads")
    kv_heads = r.whole("num_key_value_heads", heads)
    head_dim = r.whole("head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        r.problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2 and "qk_rope_head_dim" not in raw:
        r.problems.append(f"head_dim {head_dim} is odd: rotary embedding needs pairs")
    r.one_of("hidden_act", "silu")
    max_positions = r.whole("max_position_embeddings")
    layers = r.whole("num_hidden_layers", most=MAX_LAYERS)
    _check_windows(r, layers, max_positions, by_layer=family.windows_by_layer)
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
        rope=_rope(r, max_positions),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or ""),
        formats=read_formats(raw, r.problems),
    )
    if family.read is not None:
        config = replace(config, **family.read(r, layers))
    hint = _check_keys(r, family.keys, config.formats, where, tuple(harmless))
    if r.problems:
        if not hint and any(p.startswith(QUANTISED) for p in r.problems):
            hint = f"The files are whole: downloading them again gives the same.  Instead, {INSTEAD}."
        raise CheckpointError(
            f"{where}: this {family.name} configuration cannot be used:\n"
            + "\n".join(f"  {p}." for p in dict.fromkeys(r.problems)),
            hint,
        )
    return config


def _check_keys(
    r: Reader, keys: Keys, formats: tuple[WeightFormat, ...], where: str, harmless: tuple[str, ...]
) -> str:
    """Add a problem for every key on no list, nested objects included.  Returns what to do about it."""
    found = [check(r.raw, keys), *(check(o, k, f"{name}.") for name, o, k in _nested(r.raw, formats))]
    unknown = joined(found)
    _check_claims(r.raw, where, harmless, unknown)
    active = [(name, what) for name, what in unknown.active if name not in harmless]
    names = [name for name in unknown.names if name not in harmless]
    for name, what in active:
        r.problems.append(f"{shorten(name)} = {show(_value(r.raw, name))}: {what or 'this'} is not supported")
    for name in [n for n in names if n.rpartition(".")[2] in ROPE_OTHERS and "." in n]:
        reason = ROPE_OTHERS[name.rpartition(".")[2]]
        r.problems.append(f"{name} = {show(_value(r.raw, name))}: {reason}")
        names.remove(name)
    if names:
        listed = ", ".join(shorten(n, 60) for n in names[:KEYS_NAMED])
        more = f" and {len(names) - KEYS_NAMED} more" if len(names) > KEYS_NAMED else ""
        count = f"{len(names)} keys are" if len(names) > 1 else "1 key is"
        r.problems.append(f"{count} on no list of what msconv obeys or knows to change nothing: {listed}{more}")
    if not (refusable := [n for n, _ in active] + list(unknown.names)):
        return ""
    example = next((n for n in refusable if n not in harmless), "")
    return (
        "Convert the model as it was published, or a newer msconv may know the key. If a key changes nothing in "
        f"what the model computes, say so: --harmless {shorten(example, 60)} (may be repeated)."
        if example
        else ""
    )


def _check_claims(raw: Mapping[str, object], where: str, harmless: tuple[str, ...], unknown: Unknown) -> None:
    refusable = {*unknown.names, *(name for name, _ in unknown.active)}
    for name in harmless:
        if name in refusable:
            continue
        known = name in raw or _value(raw, name) is not None
        raise UsageError(
            f"--harmless {shorten(name)}: "
            + (
                f"msconv knows this key of {where}; it is obeyed or ignored already."
                if known
                else f"{where} has no such key."
            ),
            "Leave the flag out, or name a key as the message about it does, such as rope_scaling.attn_factor.",
        )


def _nested(
    raw: Mapping[str, object], formats: tuple[WeightFormat, ...]
) -> list[tuple[str, Mapping[str, object], Keys]]:
    """The objects in a configuration whose keys are checked too: (name, object, its lists)."""
    out: list[tuple[str, Mapping[str, object], Keys]] = []
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        if isinstance(value, dict):
            kind = value.get("rope_type") or value.get("type") or "default"
            if isinstance(kind, str) and kind in ROPE:  # another kind is refused as a whole
                out.append((name, value, ROPE[kind]))
    quant = raw.get("quantization_config")
    if isinstance(quant, dict) and formats:  # another method is refused as a whole
        obeyed = frozenset().union(*(f.keys for f in formats))
        harmless = {key: reason for f in formats for key, reason in f.harmless.items()}
        out.append(("quantization_config", quant, Keys(obeyed, harmless, {})))
    return out


def _value(raw: Mapping[str, object], name: str) -> object:
    if name in raw:
        return raw[name]
    outer, _, inner = name.partition(".")
    value = raw.get(outer)
    return value.get(inner) if isinstance(value, dict) else None


def _check_windows(r: Reader, layers: int, max_positions: int, by_layer: bool) -> None:
    """Windows that slide are refused, unless no layer has one or it is as long as the model's context.
    `by_layer`: layers from `max_window_layers` on slide, if `layer_types` does not say; otherwise all do."""
    kinds = r.raw.get("layer_types")
    if isinstance(kinds, list):
        if any(k != "full_attention" for k in kinds):
            r.problems.append("layer_types has layers that are not full_attention: not supported")
        elif len(kinds) != layers == r.raw.get("num_hidden_layers"):
            r.problems.append(f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}")
    elif kinds is not None:
        r.problems.append(f"layer_types = {show(kinds)}: a list is needed")
    used = r.raw.get("use_sliding_window")
    window = r.raw.get("sliding_window", "absent" if used else None)
    if window is None or (type(window) is int and window >= max_positions):
        return
    # where the first key is absent, transformers takes it for false, vLLM for true
    if (used is not None and not r.flag("use_sliding_window", False)) or (by_layer and isinstance(kinds, list)):
        return
    first = r.raw.get("max_window_layers", "absent") if by_layer else 0
    if type(first) is not int or first < layers:
        r.problems.append(
            f"use_sliding_window is {show(used)}, sliding_window {show(window)}, max_window_layers "
            f"{show(first)} of {layers} layers: sliding windows are not supported"
        )


def _rope(r: Reader, max_positions: int) -> Rope:
    values = _rope_values(r)
    p = Reader(values, "rope: ")
    kind = values.get("rope_type") or values.get("type") or "default"
    theta = p.real("rope_theta", 10000.0)
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
        p.problems.append(f"rope: rope_type {show(kind)} is not supported (default, linear, yarn are)")
    r.problems += p.problems
    return rope


def _rope_values(r: Reader) -> dict[str, object]:
    """Rotary parameters of both spellings in one object.  Two values for one of them are a problem: who reads the
    file would choose."""
    values: dict[str, object] = {"rope_theta": r.raw.get("rope_theta")}
    sources = [("", {k: v for k, v in values.items() if v is not None})]
    for name in ("rope_scaling", "rope_parameters"):
        spelled = r.raw.get(name)
        if isinstance(spelled, dict):
            sources.append((f"{name}.", {("rope_type" if k == "type" else k): v for k, v in spelled.items()}))
            if {"type", "rope_type"} <= spelled.keys() and spelled["type"] != spelled["rope_type"]:
                r.problems.append(
                    f"{name} has type {show(spelled['type'])} and rope_type {show(spelled['rope_type'])}"
                )
            values |= spelled
        elif spelled is not None:
            r.problems.append(f"{name} = {show(spelled)}: an object is needed")
    for i, (a, left) in enumerate(sources):
        for b, right in sources[i + 1 :]:
            for key in left.keys() & right.keys():
                if left[key] != right[key]:
                    r.problems.append(
                        f"{a}{key} = {show(left[key])} and {b}{key} = {show(right[key])}: only one can hold"
                    )
    return values

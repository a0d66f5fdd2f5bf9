"""Names of tensors as they are stored, and as the family's table has them: a prefix before all of them, and
experts that are stacked in one tensor.  Nothing is moved for it: a stacked expert is a range of bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from msconv_runtime.dtypes import DTYPES

from ..families import DecoderConfig, Family
from ..layout.model import TensorInfo
from ..layout.names import listing, shorten
from .unsupported import WHOLE, UnsupportedCheckpoint, untied

EMBEDDING, HEAD, BODY = "embed_tokens.weight", "lm_head.weight", "model."
OUTSIDE = re.compile(r"(?:^|\.)layers\.")
PREFIX = re.compile(r"(?:\w{1,40}\.){0,8}", re.ASCII)
STACKED = re.compile(r"(?P<experts>model\.layers\.\d+\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
SAVE_SPLIT = (
    f"{WHOLE}  Load it with transformers and save_pretrained(DIR): by default that writes experts one by one."
)


@dataclass(frozen=True)
class Named:
    """Tensors by the table's names.  `stored`: the names in the files, where they are others.  `stacked`: tensors
    of several experts, by the table's prefix, of which `tensors` has the parts.  `notes`: what to tell people."""

    tensors: dict[str, TensorInfo]
    stored: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, TensorInfo] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def named(tensors: dict[str, TensorInfo], family: Family, config: DecoderConfig, where: str) -> Named:
    """Give tensors the names of the table.  Raises UnsupportedCheckpoint for names of which only some have a
    prefix, and for stacked experts in another form than transformers 5 saves them."""
    if family.is_draft:
        return _of_draft(tensors, family)
    body, head = _prefixes(tensors)
    notes: list[str] = []
    stored: dict[str, str] = {}
    if (body, head) != (BODY, ""):
        tensors, stored = _renamed(tensors, body, head, where)
        notes.append(_say(body, head))
    if not body and not config.tied and HEAD not in tensors:
        raise untied(where)
    split, stacked = _split(tensors, config, where)
    if stacked:
        notes.append(
            f"Experts are stacked, as transformers 5 can save them: {len(stacked)} tensors read in parts."
        )
    return Named(split, stored, stacked, tuple(notes))


def _of_draft(tensors: dict[str, TensorInfo], family: Family) -> Named:
    """Names of a draft begin as the family's table has them, or as some checkpoints have them."""
    stored = {new + n[len(old) :]: n for old, new in family.other_names for n in tensors if n.startswith(old)}
    names = {old: new for new, old in stored.items() if new not in tensors}
    renamed = {names.get(n, n): replace(info, name=names.get(n, n)) for n, info in tensors.items()}
    return Named(renamed, {new: old for old, new in names.items()})


def _prefixes(names: Collection[str]) -> tuple[str, str]:
    """What stands before the embedding's name and the head's; `model.` and "" if that is not clear."""
    outer = [n for n in names if n.endswith((EMBEDDING, HEAD)) and not OUTSIDE.search(n)]
    bodies = [n.removesuffix(EMBEDDING) for n in outer if n.endswith(EMBEDDING)]
    heads = [n.removesuffix(HEAD) for n in outer if n.endswith(HEAD)]
    if len(bodies) != 1 or len(heads) > 1:
        return BODY, ""
    body, head = bodies[0], heads[0] if heads else ""
    if not PREFIX.fullmatch(body) or not body.startswith(head) or (head and not head.endswith(".")):
        return BODY, ""
    return body, head


def _renamed(
    tensors: dict[str, TensorInfo], body: str, head: str, where: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    out: dict[str, TensorInfo] = {}
    stored: dict[str, str] = {}
    others: list[str] = []
    for name, info in tensors.items():
        if name == head + HEAD:
            new = HEAD
        elif name.startswith(body) and (body or not name.startswith(BODY)):
            new = BODY + name.removeprefix(body)
        else:
            others.append(name)
            continue
        out[new] = replace(info, name=new)
        if new != name:
            stored[new] = name
    if others:
        raise UnsupportedCheckpoint(
            f"{where}: only some names begin with {body or 'no prefix'!r}, others do not ({len(others)}):\n"
            f"{listing(others)}",
            f"{WHOLE}  A prefix is read past if all names have it: save the model by itself.",
        )
    return out, stored


def _say(body: str, head: str) -> str:
    if not body:
        return "Names lack the prefix `model.`: they are read as if they had it."
    return f"All names begin with `{shorten(body)}` (the head's with `{shorten(head)}`): read as `model.`."


def _split(
    tensors: dict[str, TensorInfo], config: DecoderConfig, where: str
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """The tensors with stacked experts one by one, [E, 2F, H] as gate [F, H] and up [F, H] of each, and the
    stacked ones."""
    moe = config.moe
    stacked = {n: t for n, t in tensors.items() if STACKED.fullmatch(n)}
    if moe is None or not stacked:
        return tensors, {}
    wanted = {
        "gate_up_proj": (moe.experts, 2 * moe.ffn, config.hidden),
        "down_proj": (moe.experts, config.hidden, moe.ffn),
    }
    out: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = STACKED.fullmatch(name)
        if match is None:
            out[name] = info
            continue
        kind = match["kind"]
        if info.shape != wanted[kind] or DTYPES[info.dtype].nbytes < 2:
            raise UnsupportedCheckpoint(
                f"{where}: {shorten(name)}: stacked experts of shape {list(info.shape)}, {info.dtype}; "
                f"transformers 5 saves {list(wanted[kind])}, not quantised.",
                SAVE_SPLIT,
            )
        pieces = PARTS[kind]
        shape = (wanted[kind][1] // len(pieces), wanted[kind][2])
        nbytes = info.nbytes // (moe.experts * len(pieces))
        for i in range(moe.experts * len(pieces)):
            expert, piece = divmod(i, len(pieces))
            part = f"{match['experts']}.{expert}.{pieces[piece]}.weight"
            if part in tensors:
                raise UnsupportedCheckpoint(
                    f"{where}: {shorten(part)} is there, and {shorten(name)} with all experts too.", SAVE_SPLIT
                )
            out[part] = TensorInfo(part, info.dtype, shape, info.file, info.offset + i * nbytes, nbytes)
    return out, stacked

"""ModelSlim's quant_model_description.json: the type of every tensor, by name.

`model_quant_type` says nothing that can be relied upon: checkpoints of mixed types have that of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from .record import Header, shown

METHOD = "modelslim"  # as `quant_method`, with the file's content as `description`
DESCRIPTION = "quant_model_description.json"
KEYS = frozenset({"quant_method", "description"})

INT8 = ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX")
TYPES = ("FLOAT", *INT8)
GLOBAL = ("version", "model_quant_type", "group_size", "metadata", "optional")
CHANGES: Mapping[str, str] = {
    "W4A8_DYNAMIC": "weights of 4 bits, two in a byte",
    "W4A8": "weights of 4 bits, two in a byte",
    "W4A4_DYNAMIC": "weights and activations of 4 bits",
    "W4A4_FLATQUANT_DYNAMIC": "activations multiplied by matrices of their own (FlatQuant)",
    "W4A16": "weights of 4 bits that are multiplied as values",
    "W8A16": "weights that are multiplied as values",
    "W8A8S": "sparse weights",
    "W16A16S": "sparse weights",
    "C8": "an int8 cache of keys and values",
    "FAKQuant": "int8 attention",
    "W8A8_MXFP8": "FP8 with scales of MX formats",
    "MXFP8": "FP8 with scales of MX formats",
    "W4A8_MXFP": "4 bits with scales of MX formats",
}
SIGNS: Mapping[str, str] = {  # pieces of names of tensors that change the graph
    ".mul_scale": "a factor before a product",
    ".left_trans": "FlatQuant's matrices",
    ".right_trans": "FlatQuant's matrices",
    ".clip_ratio": "FlatQuant's clipping",
    "heads_rotation": "QuaRot's rotation of heads",
    "kronecker": "QuaRot's rotation",
    "global_rotation": "QuaRot's rotation",
    ".kv_cache_scale": "an int8 cache of keys and values",
    ".kv_cache_offset": "an int8 cache of keys and values",
    ".fa_q.": "int8 attention",
    ".fa_k.": "int8 attention",
    ".fa_v.": "int8 attention",
    ".scale_bias": "weights of 4 bits, two in a byte",
}
SOME = 3  # names in a message
LONGEST = 160  # letters of one


def read(config: Mapping[str, object], problems: list[str]) -> Mapping[str, str]:
    """{tensor: type} of a description.  What would change the graph in a way that none has is added to `problems`,
    by name."""
    description = config.get("description")
    if not isinstance(description, dict) or not all(isinstance(k, str) for k in description):
        problems.append(f"{DESCRIPTION}: an object with a type for each tensor is needed")
        return {}
    types: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name, value in description.items():
        if name in GLOBAL:
            continue
        if name.endswith("quant_type") or name == "kv_cache_type":
            if value not in (None, "", "FLOAT"):
                found.setdefault(f"{shown(value)}: {CHANGES.get(str(value), 'not supported')}", []).append(name)
        elif not isinstance(value, str) or "." not in name:
            found.setdefault(f"{shown(value)}: on no list of what msconv obeys", []).append(name)
        elif value not in TYPES:
            found.setdefault(f"{shown(value)}: {CHANGES.get(value, 'not a known type')}", []).append(name)
        elif sign := next((what for sign, what in SIGNS.items() if sign in name), ""):
            found.setdefault(sign, []).append(name)
        else:
            types[name] = value
    if description.get("group_size") not in (None, 0):
        problems.append(
            f"{DESCRIPTION}: group_size = {shown(description['group_size'])}: only one scale a row is supported"
        )
    for key in ("metadata", "optional"):
        if description.get(key):
            problems.append(
                f"{DESCRIPTION}: {key} = {shown(description[key])}: rotations change the graph, and none has them"
            )
    for what, names in found.items():
        problems.append(f"{DESCRIPTION}: {what} ({len(names)}: {_some(names)})")
    return types


def disagreements(types: Mapping[str, str], headers: Mapping[str, Header]) -> list[str]:
    """Where a description and the tensors differ: what only one of them has, and matrices of another element type
    than theirs.  One line for each kind."""
    if not types:
        return []
    found: dict[str, list[str]] = {}
    for name in types:
        if name not in headers:
            found.setdefault(f"described in {DESCRIPTION}, and in no file", []).append(name)
    for name, header in headers.items():
        kind = types.get(name)
        if kind is None:
            found.setdefault(f"in the files, and not described in {DESCRIPTION}", []).append(name)
        elif name.endswith(".weight") and (kind in INT8) != (header.dtype == "int8"):
            found.setdefault(f"described as {kind} in {DESCRIPTION}, and of type {header.dtype}", []).append(name)
    return [f"{what} ({len(names)}): {_some(names)}." for what, names in found.items()]


def _some(names: list[str]) -> str:
    """Some of the names, printable and of bounded length."""
    listed = (name.encode("unicode_escape").decode()[:LONGEST] for name in names[:SOME])
    return ", ".join(listed) + (", ..." if len(names) > SOME else "")

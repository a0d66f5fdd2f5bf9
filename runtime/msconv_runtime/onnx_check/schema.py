"""Messages of an ONNX file, as far as ours have them: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto."""

from __future__ import annotations

from typing import Any

from ..mindir_check.wire import Field, Malformed, Message, read

MODEL: Message = {
    1: Field("ir_version", "int"),
    2: Field("producer_name", "text"),
    7: Field("graph", "bytes"),
    8: Field("opset_import", "bytes", many=True),
}
OPSET: Message = {1: Field("domain", "text"), 2: Field("version", "int")}
GRAPH: Message = {
    1: Field("node", "bytes", many=True),
    2: Field("name", "text"),
    5: Field("initializer", "bytes", many=True),
    11: Field("input", "bytes", many=True),
    12: Field("output", "bytes", many=True),
}
NODE: Message = {
    1: Field("input", "text", many=True),
    2: Field("output", "text", many=True),
    4: Field("op_type", "text"),
    5: Field("attribute", "bytes", many=True),
}
ATTRIBUTE: Message = {
    1: Field("name", "text"),
    2: Field("f", "bits32"),
    3: Field("i", "int"),
    4: Field("s", "bytes"),
    6: Field("g", "bytes"),
    8: Field("ints", "int", many=True),
    20: Field("type", "int"),
}
TENSOR: Message = {
    1: Field("dims", "int", many=True),
    2: Field("data_type", "int"),
    8: Field("name", "text"),
    9: Field("raw_data", "bytes"),
    13: Field("external_data", "bytes", many=True),
    14: Field("data_location", "int"),
}
ENTRY: Message = {1: Field("key", "text"), 2: Field("value", "text")}
VALUE: Message = {1: Field("name", "text"), 2: Field("type", "bytes")}
TYPE: Message = {1: Field("tensor_type", "bytes")}
TENSOR_TYPE: Message = {1: Field("elem_type", "int"), 2: Field("shape", "bytes")}
SHAPE: Message = {1: Field("dim", "bytes", many=True)}
DIM: Message = {1: Field("dim_value", "int"), 2: Field("dim_param", "text")}

ELEMENTS = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
BYTES = {1: 4, 7: 8, 9: 1, 10: 2, 16: 2}
KINDS = {"f": ("float", 1), "i": ("int", 2), "s": ("text", 3), "g": ("graph", 5), "ints": ("ints", 7)}


def attribute(data: bytes, what: str) -> tuple[str, str, Any]:
    """Name, kind and value.  Raises Malformed for one that has no value, two, or another type than it says."""
    found = read(data, ATTRIBUTE, what)
    name, ints = found.get("name", ""), found.pop("ints")
    held = {key: found[key] for key in KINDS if key in found} | ({"ints": ints} if ints else {})
    if len(held) != 1:
        raise Malformed(f"{what}: its attribute {name[:40]!r} has {len(held)} values")
    ((key, value),) = held.items()
    kind, number = KINDS[key]
    if found.get("type") != number:
        raise Malformed(f"{what}: its attribute {name[:40]!r} says it is of type {found.get('type')}")
    return name, kind, value


def value(data: bytes, what: str) -> tuple[str, int, list[int | None]]:
    """Name, element type and shape of an input or output; None for a dimension that has a name."""
    found = read(data, VALUE, what)
    kind = read(read(found.get("type", b""), TYPE, what).get("tensor_type", b""), TENSOR_TYPE, what)
    if "shape" not in kind:
        raise Malformed(f"{what}: has no shape")
    dims = [read(d, DIM, what) for d in read(kind["shape"], SHAPE, what)["dim"]]
    if odd := next((d for d in dims if len(d) != 1), None):
        raise Malformed(f"{what}: has a dimension {odd}")
    return found.get("name", ""), kind.get("elem_type", 0), [d.get("dim_value") for d in dims]

"""Which fields of MindSpore's mind_ir.proto an exported graph has, and what values its parts have.

What is not named here is refused: functions, sub-graphs, preprocessors, external data, layouts, user information.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from .allowed import MOST_ITEMS, MOST_WAITED_FOR, Value
from .wire import Field, Malformed, Message, read

MODEL: Message = {
    1: Field("ir_version", "text"),
    2: Field("producer_name", "text"),
    3: Field("producer_version", "text"),
    5: Field("model_version", "text"),
    7: Field("graph", "span"),
    10: Field("little_endian", "int"),
    12: Field("primitives", "bytes", many=True),
    13: Field("mind_ir_version", "int"),
}
GRAPH: Message = {
    1: Field("node", "bytes", many=True),
    2: Field("name", "text"),
    3: Field("parameter", "bytes", many=True),
    5: Field("input", "bytes", many=True),
    6: Field("output", "bytes", many=True),
    7: Field("bprop_hash", "text"),
    8: Field("attribute", "bytes", many=True),
    9: Field("bprop_filepath", "text"),
}
NODE: Message = {
    1: Field("input", "bytes", many=True),
    2: Field("output", "bytes", many=True),
    3: Field("name", "bytes"),
    4: Field("op_type", "bytes"),
    5: Field("attribute", "bytes", many=True),
    7: Field("domain", "bytes"),
    8: Field("node_attr", "bytes", many=True),
}
PRIMITIVE: Message = {
    1: Field("name", "text"),
    2: Field("op_type", "text"),
    3: Field("attribute", "bytes", many=True),
    4: Field("instance_name", "text"),
    5: Field("prim_type", "int"),
}
VALUE: Message = {
    1: Field("name", "text"),
    2: Field("tensor", "bytes", many=True),
    4: Field("denotation", "text"),
    5: Field("attr_info", "bytes"),
}
TENSOR: Message = {
    1: Field("dims", "int", many=True),
    2: Field("data_type", "int"),
    7: Field("name", "text"),
    9: Field("raw_data", "span"),
    13: Field("ref_key", "text"),
    16: Field("compression_type", "int"),
}
ATTRIBUTE: Message = {
    1: Field("name", "text"),
    2: Field("f", "bits32"),
    3: Field("i", "int"),
    5: Field("s", "text"),
    10: Field("ints", "int", many=True),
    11: Field("strings", "text", many=True),
    12: Field("tensors", "bytes", many=True),
    16: Field("type", "int"),
    17: Field("values", "bytes", many=True),
    18: Field("seq_info", "bytes"),
}
SEQUENCE: Message = {1: Field("is_dyn_len", "int"), 2: Field("tuple_elem_item", "bytes")}

FLOAT, INT64, STRING, BOOL = 1, 7, 8, 9  # AttributeType
TENSORS, TUPLE, LIST, UMONAD, NONE, SCALAR = 19, 20, 21, 23, 25, 39
ITEM_BYTES = {1: 4, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 16: 2}  # TensorProto.DataType of exported graphs: its size
DTYPES = {"float32": 1, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
KEY, VALUE_NAME = re.compile(r"[\w.]{0,200}", re.ASCII), re.compile("value[0-9]{1,6}")
MOST_DIMENSIONS, MOST_SIZE = 8, 1 << 48


def dims(found: dict[str, Any], what: str) -> list[int]:
    """A tensor's shape, -1 where it is free.  Raises Malformed for what no memory holds."""
    shape: list[int] = found["dims"]
    known = math.prod(n for n in shape if n > 0)
    if len(shape) > MOST_DIMENSIONS or any(not -1 <= n < 1 << 31 for n in shape) or known > MOST_SIZE:
        raise Malformed(f"{what}: has the shape {shape[: MOST_DIMENSIONS + 1]}")
    return shape


def tensor(data: bytes, what: str, *optional: str) -> dict[str, Any]:
    """A tensor's type and shape, and of `optional` what is there.  Raises Malformed for other fields."""
    found = read(data, TENSOR, what)
    if found.get("data_type") not in ITEM_BYTES or found.keys() - {"dims", "data_type", *optional}:
        raise Malformed(f"{what}: has a tensor of type {found.get('data_type')} with {sorted(found)}")
    if not KEY.fullmatch(found.get("ref_key", "0")):
        raise Malformed(f"{what}: has a key that no exporter gives")
    dims(found, what)
    return found


def result(data: bytes, what: str) -> str:
    """What a node gives, as its `shape` says: tensor, scalar, tuple or monad.  Raises Malformed."""
    found = _attribute(data, what, "shape")
    kind = found.get("type")
    if kind == TENSORS:
        _only(found, what, "name", "tensors")
        tensor(_single(found["tensors"], what), what, "ref_key")
        return "tensor"
    if kind == SCALAR:
        _scalar(found, what, "name")
        return "scalar"
    if kind == UMONAD:
        _only(found, what, "name")
        return "monad"
    if kind != TUPLE or len(found["values"]) > MOST_WAITED_FOR:
        raise Malformed(f"{what}: gives a value of kind {kind}")
    _only(found, what, "name", "values", "seq_info")
    _sequence(found.get("seq_info"), what)
    for item in found["values"]:
        part = read(item, ATTRIBUTE, what)
        if part.get("type") == SCALAR:
            _scalar(part, what)
        else:
            _only(part, what, "tensors")
            tensor(_single(part["tensors"], what), what, "ref_key")
            if part.get("type") != TENSORS:
                raise Malformed(f"{what}: gives a tuple of values of kind {part.get('type')}")
    return "tuple"


def tuple_of_tensors(data: bytes, what: str) -> list[dict[str, Any]]:
    """Types and shapes of a tuple of fixed length.  Raises Malformed for any other value."""
    found = read(data, ATTRIBUTE, what)
    _only(found, what, "values", "seq_info")
    if found.get("type") != TUPLE or len(found["values"]) > MOST_WAITED_FOR:
        raise Malformed(f"{what}: is no tuple of tensors")
    _sequence(found.get("seq_info"), what)
    held = []
    for item in found["values"]:
        part = read(item, ATTRIBUTE, what)
        _only(part, what, "tensors")
        if part.get("type") != TENSORS:
            raise Malformed(f"{what}: is a tuple of values of kind {part.get('type')}")
        held.append(tensor(_single(part["tensors"], what), what))
    return held


def _scalar(found: dict[str, Any], what: str, *names: str) -> None:
    _only(found, what, "tensors", *names)
    if tensor(_single(found["tensors"], what), what)["dims"] not in ([], [0]):
        raise Malformed(f"{what}: gives a scalar with a shape")


def _sequence(data: bytes | None, what: str) -> None:
    if data is None:
        raise Malformed(f"{what}: gives a tuple that does not say whether its length is fixed")
    found = read(data, SEQUENCE, what)
    if found.get("is_dyn_len") not in (0, 1):
        raise Malformed(f"{what}: gives a tuple of no length")
    if "tuple_elem_item" in found:
        part = read(found["tuple_elem_item"], ATTRIBUTE, what)
        if part.get("type") != SCALAR:
            raise Malformed(f"{what}: gives a tuple of values of kind {part.get('type')}")
        _scalar(part, what)


def constant(data: bytes, what: str) -> None:
    """Raises Malformed unless it is a value that exported graphs have: numbers, tensors, tuples of integers."""
    found = _attribute(data, what, "value")
    kind = found.get("type")
    if kind not in _CONSTANTS:
        raise Malformed(f"{what}: is a value of kind {kind}")
    _CONSTANTS[kind](found, what)


def _flag(found: dict[str, Any], what: str) -> None:
    _only(found, what, "name", "i")
    if found.get("i") not in (0, 1):
        raise Malformed(f"{what}: is neither true nor false")


def _number(found: dict[str, Any], what: str) -> None:
    _only(found, what, "name", "i" if found["type"] == INT64 else "f")


def _nothing(found: dict[str, Any], what: str) -> None:
    _only(found, what, "name")


def _values(found: dict[str, Any], what: str) -> None:
    _only(found, what, "name", "tensors")
    data = _single(found["tensors"], what)
    held = tensor(data, what, "name", "raw_data")
    if not VALUE_NAME.fullmatch(held.get("name", "")):
        raise Malformed(f"{what}: has a name that no exporter gives")
    begin, end = held.get("raw_data", (0, 0))
    size = math.prod(held["dims"]) * ITEM_BYTES[held["data_type"]]
    if min(held["dims"], default=0) < 0 or end - begin != size or not size:
        raise Malformed(f"{what}: has {end - begin} bytes for the shape {held['dims']}")


def _integers(found: dict[str, Any], what: str) -> None:
    _only(found, what, "name", "values")
    for item in found["values"][: MOST_ITEMS + 1]:
        part = read(item, ATTRIBUTE, what)
        _only(part, what, "ints")
        if part.get("type") != INT64 or len(part["ints"]) != 1:
            raise Malformed(f"{what}: is a tuple of values of kind {part.get('type')}")
    if len(found["values"]) > MOST_ITEMS:
        raise Malformed(f"{what}: is a tuple of {len(found['values'])}")


_CONSTANTS: dict[int | None, Callable[[dict[str, Any], str], None]] = {
    BOOL: _flag,
    FLOAT: _number,
    INT64: _number,
    TENSORS: _values,
    TUPLE: _integers,
    NONE: _nothing,
    UMONAD: _nothing,
}


def attributes(many: list[bytes], what: str) -> dict[str, Value]:
    """Name and value of each.  Raises Malformed for one that is there twice, and for kinds that none has."""
    found: dict[str, Value] = {}
    for data in many:
        one = read(data, ATTRIBUTE, what)
        name = one.get("name", "")
        if name in found:
            raise Malformed(f"{what}: has {name[:40]!r} twice")
        found[name] = _value(one, what, "name")
    return found


def _value(found: dict[str, Any], what: str, *names: str) -> Value:
    kind = found.get("type")
    if kind in (BOOL, INT64) and "i" in found:
        _only(found, what, "i", *names)
        number: int = found["i"]
        return bool(number) if kind == BOOL and number in (0, 1) else number
    if kind == STRING and "s" in found:
        _only(found, what, "s", *names)
        text: str = found["s"]
        return text
    if kind in (LIST, TUPLE) and names and len(found["values"]) <= MOST_ITEMS:
        _only(found, what, "values", *names)
        items = (read(item, ATTRIBUTE, what) for item in found["values"])
        return "LIST" if kind == LIST else "TUPLE", *(_item(item, what) for item in items)
    raise Malformed(f"{what}: has an attribute {found.get('name', '')[:40]!r} of kind {kind}")


def _item(found: dict[str, Any], what: str) -> Value:
    field = {STRING: "strings", INT64: "ints"}.get(found.get("type", 0))
    if field is None or len(found[field]) != 1:
        raise Malformed(f"{what}: has an attribute that is a list of kind {found.get('type')}")
    _only(found, what, field)
    value: Value = found[field][0]
    return value


def _attribute(data: bytes, what: str, name: str) -> dict[str, Any]:
    found = read(data, ATTRIBUTE, what)
    if found.get("name") != name:
        raise Malformed(f"{what}: has an attribute {found.get('name', '')[:40]!r}, not {name}")
    return found


def _only(found: dict[str, Any], what: str, *names: str) -> None:
    """Raises Malformed if a field has something that none of this kind has."""
    if odd := [name for name, value in found.items() if value != [] and name not in (*names, "type")]:
        raise Malformed(f"{what}: has {', '.join(odd)} beside {', '.join(names)}")


def _single(values: list[bytes], what: str) -> bytes:
    if len(values) != 1:
        raise Malformed(f"{what}: has {len(values)} values, not one")
    return values[0]

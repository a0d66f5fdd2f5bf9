"""What a MindIR consists of, node by node: kinds, types and shapes of results, whole-number constants.  Read
without MindSpore and without torch; nothing is executed.  Whether msconv would make it, mindir_check says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msconv_runtime.errors import ArtifactError
from msconv_runtime.mindir_check import schema
from msconv_runtime.mindir_check.wire import Malformed, read

PREFIX = "msconv:"  # of parameters' and inputs' names
NUMBER_TYPES = (schema.BOOL, schema.INT64)


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor: its shape, -1 where it is free, and the bytes of an element."""

    shape: tuple[int, ...]
    item_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """A node.  `gives`: a tensor, or those of a tuple; () for what is no tensor.  `value`: a constant's whole
    number, or tuple of them, None for any other.  `attributes`: the primitive's whole numbers."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    gives: tuple[Given, ...]
    value: int | tuple[int, ...] | None
    attributes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Outline:
    """`parameters`: weights by the value's name.  `inputs`: names of the graph's inputs with what they are, in
    call order."""

    parameters: dict[str, Given]
    inputs: tuple[tuple[str, Given], ...]
    steps: tuple[Step, ...]


def outline(data: bytes, where: str) -> Outline:
    """Read a file's bytes.  Raises ArtifactError naming `where` if they are no flat MindIR."""
    try:
        return _outline(data)
    except (Malformed, KeyError, IndexError) as e:
        raise ArtifactError(f"{where}: is not a graph that msconv makes: {e}.", "Compile it again.") from None


def _outline(data: bytes) -> Outline:
    model = read(data, schema.MODEL, "the file")
    kinds = dict(_primitive(p) for p in model["primitives"])
    graph = read(data, schema.GRAPH, "the graph", *model["graph"])
    parameters = {}
    for held in graph["parameter"]:
        found = read(held, schema.TENSOR, "a parameter")
        parameters[found["name"]] = _given(found)
    inputs = []
    for held in graph["input"]:
        value = read(held, schema.VALUE, "an input")
        inputs.append((value["name"], _given(read(value["tensor"][0], schema.TENSOR, value["name"]))))
    return Outline(parameters, tuple(inputs), tuple(_step(node, kinds) for node in graph["node"]))


def _primitive(data: bytes) -> tuple[str, tuple[str, dict[str, int]]]:
    found = read(data, schema.PRIMITIVE, "a primitive")
    attributes = [read(a, schema.ATTRIBUTE, found["name"]) for a in found["attribute"]]
    kind: str = found["op_type"]
    if kind == "Custom":
        kind = next(a["s"] for a in attributes if a["name"] == "func_name")
    numbers = {a["name"]: a["i"] for a in attributes if a.get("type") in NUMBER_TYPES and "i" in a}
    return "REF::" + found["name"], (kind, numbers)


def _step(data: bytes, kinds: dict[str, tuple[str, dict[str, int]]]) -> Step:
    node = read(data, schema.NODE, "a node")
    name = node["output"][0].decode()
    inputs = tuple(i.decode() for i in node["input"])
    held = read(node["attribute"][0], schema.ATTRIBUTE, name)
    kind = node["op_type"].decode()
    if kind == "Constant":
        return Step(kind, inputs, name, _tensors(held), _value(held), {})
    kind, attributes = kinds[kind]
    return Step(kind, inputs, name, _tensors(held), None, attributes)


def _tensors(found: dict[str, Any]) -> tuple[Given, ...]:
    """A tensor's shape, or those of a tuple's items; scalars are tensors of no dimensions."""
    if found["tensors"]:
        return (_given(read(found["tensors"][0], schema.TENSOR, "a result")),)
    items = (read(item, schema.ATTRIBUTE, "an item") for item in found["values"])
    return tuple(given for item in items for given in _tensors(item))


def _given(found: dict[str, Any]) -> Given:
    return Given(tuple(found["dims"]), schema.ITEM_BYTES[found["data_type"]])


def _value(found: dict[str, Any]) -> int | tuple[int, ...] | None:
    if found.get("type") in NUMBER_TYPES:
        return int(found.get("i", 0))
    if found.get("type") != schema.TUPLE:
        return None
    items = [read(item, schema.ATTRIBUTE, "an item") for item in found["values"]]
    return tuple(int(item["ints"][0]) for item in items if item["ints"])

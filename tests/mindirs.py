"""MindIR files written by hand, from mind_ir.proto: a small one that is right, and pieces to forge others with."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from msconv_runtime.artifact import Graph, GraphInput, GraphOutput, GraphParameter, digest_bytes

TENSORS, TUPLE, UMONAD, INT64, BOOL, STRING = 19, 20, 23, 7, 9, 8
Fields = Sequence[tuple[int, Any]]


def encode(fields: Fields) -> bytes:
    """A message: whole numbers, floats of four bytes, text, bytes, or the fields of a message inside."""
    return b"".join(field(number, value) for number, value in fields)


def field(number: int, value: Any) -> bytes:
    if isinstance(value, bool | int):
        return varint(number << 3) + varint(int(value))
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else encode(value)
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tensor(dims: Sequence[int], data_type: int = 1) -> Fields:
    return [*((1, n) for n in dims), (2, data_type)]


def shape(dims: Sequence[int], data_type: int = 1) -> Fields:
    """What a node gives."""
    return [(1, "shape"), (12, tensor(dims, data_type)), (16, TENSORS)]


def node(index: int, kind: str, inputs: Sequence[str], gives: Fields, *more: tuple[int, Any]) -> bytes:
    name = f"n{index}"
    return encode([*((1, i) for i in inputs), (2, name), (3, name), (4, kind), (5, gives), (7, ""), *more])


def primitive(kind: str, number: int = 1, is_function: bool = True, attributes: Sequence[Fields] = ()) -> bytes:
    name = f"{kind}:{number}"
    return encode([(1, name), (2, kind), *((3, a) for a in attributes), (4, "run"), (5, 2 if is_function else 1)])


def model(nodes: Sequence[bytes], primitives: Sequence[bytes], width: int = 23) -> bytes:
    """A graph of one weight [width, 4], token ids and a cache; what its last node gives is [T, width]."""
    graph = [
        *((1, n) for n in nodes),
        (2, "msconv"),
        (3, [*tensor([width, 4]), (7, "msconv:lm_head.weight"), (13, "0"), (16, 0)]),
        (5, [(1, "msconv:inputs0"), (2, tensor([-1], 6))]),
        (5, [(1, "msconv:inputs1"), (2, tensor([-1, 1, 2, 4]))]),
        (6, [(1, f"n{len(nodes) - 1}"), (2, tensor([-1, width]))]),
        (7, ""),
        (8, [(1, "phase"), (5, "export"), (16, STRING)]),
        (9, ""),
    ]
    head: Fields = [(1, "1.1"), (2, "MindSpore"), (5, "2.10.0"), (7, graph), (10, 1)]
    return encode([*head, *((12, p) for p in primitives), (13, 3)])


LOAD = primitive("Load", 2, is_function=False)
MUL = primitive("Mul", 3)


def small(width: int = 23) -> bytes:
    """Four nodes: a monad, the weight, its square and that one's square."""
    nodes = [
        node(0, "Constant", [], [(1, "value"), (16, UMONAD)]),
        node(1, "REF::Load:2", ["msconv:lm_head.weight", "n0"], shape([width, 4])),
        node(2, "REF::Mul:3", ["n1", "n1"], shape([width, 4])),
        node(3, "REF::Mul:3", ["n2", "n2"], shape([-1, width])),
    ]
    return model(nodes, [LOAD, MUL], width)


def entry(data: bytes, target: str = "cpu", role: str = "decode", width: int = 23, **changes: Any) -> Graph:
    """The manifest's entry of `small`, or of what was forged from it."""
    fields: dict[str, Any] = {
        "target": target,
        "role": role,
        "path": f"graphs/{target}/{role}.mindir",
        "size": len(data),
        "digest": digest_bytes(data),
        "mindspore": "2.10.0",
        "nodes": 4,
        "inputs": [
            GraphInput("input_ids", "int32", [None]),
            GraphInput("k_cache.0", "float32", [None, 1, 2, 4], "cache"),
        ],
        "outputs": [GraphOutput("logits", "float32", [None, width])],
        "reads": [GraphParameter("lm_head.weight", "float32", [width, 4])],
    }
    return Graph(**fields | changes)

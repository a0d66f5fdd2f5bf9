"""What an ONNX file of ours may hold: operators with their attributes, by form, and no other.  Data.

A test exports the graphs of all families, and fails for what is missing here and for what no graph uses.  No
operator of another domain is here, no function, and no constant that lies outside the artifact's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

INT, FLOAT, INTS, TEXT, GRAPH = "int", "float", "ints", "text", "graph"


class Operator(NamedTuple):
    """`inputs`, `outputs`: how many, least and most.  `attributes`: names and kinds of those it may have."""

    inputs: tuple[int, int]
    outputs: tuple[int, int] = (1, 1)
    attributes: Mapping[str, str] = {}


def operator(inputs: int, **attributes: str) -> Operator:
    return Operator((inputs, inputs), (1, 1), attributes)


COMMON = {
    "Add": operator(2),
    "And": operator(2),
    "Cast": operator(1, to=INT),
    "Concat": Operator((2, 2), attributes={"axis": INT}),
    "Cos": operator(1),
    "CumSum": operator(2),
    "Div": operator(2),
    "Equal": operator(2),
    "Gather": operator(2, axis=INT),
    "GatherElements": operator(2, axis=INT),
    "Gemm": Operator((2, 3), attributes={"transB": INT}),
    "Greater": operator(2),
    "Identity": operator(1),
    "LessOrEqual": operator(2),
    "MatMul": operator(2),
    "Mul": operator(2),
    "ReduceSum": operator(2, keepdims=INT),
    "Reshape": operator(2),
    "Sigmoid": operator(1),
    "Sin": operator(1),
    "Softmax": operator(1, axis=INT),
    "Split": Operator((1, 2), (2, 3), {"axis": INT}),
    "Sub": operator(2),
    "TopK": Operator((2, 2), (2, 2), {"axis": INT}),
    "Transpose": operator(1, perm=INTS),
    "Unsqueeze": operator(2),
    "Where": operator(3),
}
ANY_SHAPE = COMMON | {
    "Attention": operator(4, scale=FLOAT),
    "GatherND": operator(2),
    "Loop": operator(3, body=GRAPH),
    "NonZero": operator(1),
    "RMSNormalization": operator(2, axis=INT, epsilon=FLOAT),
    "RotaryEmbedding": operator(3),
    "ScatterND": operator(3, reduction=TEXT),
    "Shape": operator(1),
    "Size": operator(1),
    "Unique": operator(1, sorted=INT),
}
FIXED_SHAPES = COMMON | {
    "Expand": operator(2),
    "ReduceMean": operator(1, axes=INTS, keepdims=INT),
    "Sqrt": operator(1),
}


class Allowed(NamedTuple):
    """A form: its version of the standard, of the file, and its operators."""

    opset: int
    ir_version: int
    operators: Mapping[str, Operator]


ALLOWED = {"": Allowed(23, 11, ANY_SHAPE), "static": Allowed(17, 8, FIXED_SHAPES)}  # by a graph's variant

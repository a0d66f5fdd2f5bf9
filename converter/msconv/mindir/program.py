"""A shipped MindIR as a list of steps: parsed, checked, nothing executed."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from msconv_runtime.errors import VerificationFailed

DATA_TYPES = {  # TensorProto.DataType of mind_ir.proto
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
OF_KERNELS = {"autodiff", "imply_path", "multi_output", "pure_input_names", "reg_op_name", "uniq_name"}
ORDER = "UpdateState"  # what came before what; it has no value
HARMLESS = {"input_names", "output_names", "side_effect_mem", "side_effect_propagate", "use_locking"}


@dataclass(frozen=True)
class Node:
    """`kind` is the primitive's name, a compiled kernel's `library:function`, or `Constant` with its `value`.
    `where` is for messages."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]
    value: Any = None
    parameter: str = ""  # weight that the node multiplies by or looks up, for naming places
    last_parameter: str = ""  # and the last one that it takes

    @property
    def where(self) -> str:
        return f"{self.output} ({self.kind}{', ' + self.parameter if self.parameter else ''})"


@dataclass(frozen=True)
class Program:
    """Steps in the order in which the result demands them: what nothing leads to is not run, and a write comes
    before a read only if an edge of the graph says so.  `last_use[name]` is the last step that reads a value.
    """

    parameters: dict[str, str]  # value name -> weight name
    declared: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]  # weight name -> type and shape
    inputs: list[str]
    nodes: list[Node]
    output: str  # one value, or the tuple of several
    dtype: torch.dtype
    num_outputs: int = 1
    last_use: dict[str, int] = field(default_factory=dict)


def parse(path: Path) -> Program:
    """Raises VerificationFailed if the file is no flat MindIR."""
    return parse_bytes(path.read_bytes(), str(path))


def parse_bytes(data: bytes, path: str) -> Program:
    """The same of a file's content.  `path` is for messages."""
    from mindspore.train import mind_ir_pb2

    try:
        model = mind_ir_pb2.ModelProto.FromString(data)
    except Exception as e:
        raise VerificationFailed(f"{path}: not a MindIR: {e}") from None
    graph = model.graph
    if model.functions or len(graph.output) != 1:
        raise VerificationFailed(f"{path}: has sub-graphs, or outputs that are no tuple: not one of ours.")
    primitives = {p.name: p for p in model.primitives}
    parameters = {p.name: p.name.rpartition(":")[2] for p in graph.parameter}
    loaded = dict(parameters)  # values that are a weight, through Load
    nodes = []
    for n in graph.node:
        if n.op_type == "Constant":
            nodes.append(Node("Constant", (), n.output[0], {}, _value(n.attribute[0])))
            continue
        kind, _, reference = n.op_type.partition("::")
        if kind != "REF" or reference not in primitives:
            raise VerificationFailed(f"{path}: {n.output[0]}: {n.op_type} is no primitive of this graph.")
        primitive = primitives[reference]
        attributes = {a.name: _value(a) for a in primitive.attribute if a.name not in HARMLESS}
        op_type = primitive.op_type
        if op_type == "Custom":
            op_type = str(attributes.pop("func_name", op_type))
            attributes = {k: v for k, v in attributes.items() if k not in OF_KERNELS}
        inputs = tuple(n.input)
        weights = [loaded[i] for i in inputs if i in loaded] or [""]
        if op_type == "Load" and weights[0]:
            loaded[n.output[0]] = weights[0]
        nodes.append(Node(op_type, inputs, n.output[0], attributes, None, weights[0], weights[-1]))
    floats = [DATA_TYPES.get(p.data_type) for p in graph.parameter]
    dtype = next((d for d in floats if d in (torch.bfloat16, torch.float16)), torch.float32)
    output = graph.output[0].name
    nodes = _without_order(_on_demand(_without_loads(nodes, parameters, output), output))
    last_use = {name: i for i, n in enumerate(nodes) for name in n.inputs}
    declared = {parameters[p.name]: (DATA_TYPES.get(p.data_type), tuple(p.dims)) for p in graph.parameter}
    given = [i.name for i in graph.input]
    count = _num_outputs(graph.output[0])
    return Program(parameters, declared, given, nodes, output, dtype, count, last_use)


def _num_outputs(output: Any) -> int:
    """How many values the graph returns: several are one tuple."""
    return len(output.attr_info.values) if output.HasField("attr_info") else 1


def _on_demand(nodes: list[Node], output: str) -> list[Node]:
    """Depth first from the output, each node's inputs from left to right."""
    made = {n.output: n for n in nodes}
    done: set[str] = set()
    order: list[Node] = []
    stack = [(output, False)]
    while stack:
        name, ready = stack.pop()
        if name in done or name not in made:
            continue
        if ready:
            done.add(name)
            order.append(made[name])
        else:
            stack.append((name, True))
            stack += [(i, False) for i in reversed(made[name].inputs)]
    return order


def _without_loads(nodes: list[Node], parameters: Collection[str], output: str) -> list[Node]:
    """The same nodes, which take weights themselves and not what Load makes of them: a weight that two layers read
    is then no value that is held between them."""
    of = {n.output: n.inputs[0] for n in nodes if n.kind == "Load" and n.inputs[:1] and n.inputs[0] in parameters}
    of.pop(output, None)
    kept = (n for n in nodes if n.output not in of)
    return [replace(n, inputs=tuple(of.get(i, i) for i in n.inputs)) for n in kept]


def _without_order(nodes: list[Node]) -> list[Node]:
    """The same nodes, in an order that stands: what only says it again no longer holds values, of which weights
    and caches are most."""
    needed = {name for n in nodes if n.kind != ORDER for name in n.inputs}
    ordered = {name for n in nodes if n.kind == ORDER for name in n.inputs}
    kept = (n for n in nodes if n.kind != "MakeTuple" or n.output in needed or n.output not in ordered)
    return [replace(n, inputs=()) if n.kind == ORDER else n for n in kept]


def _value(a: Any) -> Any:
    kind = a.AttributeType.Name(a.type)
    if kind in ("NONE", "UMONAD", "IOMONAD"):
        return None
    if kind in ("TENSORS", "TENSOR"):
        return _tensor(a.tensors[0])
    if kind in ("TUPLE", "LIST"):
        return tuple(_value(v) for v in a.values)
    if kind == "BOOL":
        return bool(a.i)
    if kind in ("FLOAT", "FLOAT16"):
        return a.f
    if kind == "DOUBLE":
        return a.d
    if kind == "STRING":
        return a.s.decode()
    if kind.startswith(("INT", "UINT")):
        return a.ints[0] if len(a.ints) else a.i
    if kind == "TYPE_NULL":
        return None
    raise VerificationFailed(f"attribute {a.name}: values of kind {kind} are not known here.")


def _tensor(t: Any) -> torch.Tensor:
    dtype = DATA_TYPES.get(t.data_type)
    if dtype is None:
        raise VerificationFailed(f"constant {t.name}: element type {t.data_type} is not known here.")
    data = bytearray(t.raw_data)
    if not data:
        if math.prod(t.dims):
            raise VerificationFailed(f"constant {t.name}: has no values.")
        return torch.zeros(list(t.dims), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(list(t.dims)).clone()

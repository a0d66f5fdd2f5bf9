"""Writing a MindIR so that the same graph gives the same bytes, in any process."""

from __future__ import annotations

from collections import Counter
from typing import Any


def canonical(proto: bytes) -> tuple[bytes, dict[str, int]]:
    """The same graph under names of our own; and its nodes by kind.

    MindSpore names values after source lines and Python variables, in an order that changes from run to run,
    and gives parameters addresses of this process as keys.
    """
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto.FromString(proto)
    graph = model.graph
    names: dict[str, str] = {}
    for given in (*graph.parameter, *graph.input):
        names[given.name] = "msconv:" + given.name.rpartition(":")[2]
        given.name = names[given.name]
    for i, node in enumerate(graph.node):
        for output in node.output:
            names[output] = f"n{i}"
    for node in graph.node:
        node.input[:] = [names.get(v, v) for v in node.input]
        node.output[:] = [names[v] for v in node.output]
        node.name = node.output[0]
        node.domain = ""
    for value in graph.output:
        value.name = names.get(value.name, value.name)
    keys: dict[str, str] = {}
    tensors = [t for value in graph.input for t in value.tensor]
    tensors += [t for node in graph.node for a in node.attribute for t in a.tensors]
    for tensor in (*graph.parameter, *tensors):
        if tensor.ref_key:
            tensor.ref_key = keys.setdefault(tensor.ref_key, str(len(keys)))
    primitives = sorted(model.primitives, key=lambda p: p.name)
    for primitive in primitives:
        if primitive.op_type == "Custom":
            _infer_at_load(primitive)
        attributes = sorted(primitive.attribute, key=lambda a: a.name)
        del primitive.attribute[:]
        primitive.attribute.extend(attributes)
    del model.primitives[:]
    model.primitives.extend(primitives)
    for attribute in graph.attribute:
        if attribute.name == "compile_phase":
            attribute.s = b"export.mindir"
    graph.name = "msconv"
    data: bytes = model.SerializeToString(deterministic=True)
    return data, _kinds(model)


def _infer_at_load(primitive: Any) -> None:
    """A compiled kernel's shapes and types come from its library when the graph is loaded: Python's stay here."""
    from mindspore.train import mind_ir_pb2

    kind = mind_ir_pb2.AttributeProto.AttributeType
    for name in ("cpp_infer_shape", "cpp_infer_type"):
        primitive.attribute.add(name=name, type=kind.Value("BOOL"), i=1)


def _kinds(model: Any) -> dict[str, int]:
    """How many nodes there are of each primitive, sorted by its name; constants are `Constant`, a compiled kernel
    has its own name."""
    primitives = {"REF::" + p.name: p.op_type for p in model.primitives}
    for p in model.primitives:
        if p.op_type == "Custom":
            primitives["REF::" + p.name] = next(a.s.decode() for a in p.attribute if a.name == "func_name")
    return dict(sorted(Counter(primitives.get(n.op_type, n.op_type) for n in model.graph.node).items()))

"""Forged MindIR files: each change makes a graph that no exporter writes, or damages its bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from mindspore.train import mind_ir_pb2 as pb

from tests.mindirs import varint

TYPES = pb.AttributeProto.AttributeType
KINDS = [
    "Print",
    "PyExecute",
    "PyFunc",
    "PyInterpret",
    "Custom",
    "CustomOp",
    "TensorDump",
    "DumpGradient",
    "ImageSummary",
    "TensorSummary",
    "Assert",
    "MakeRef",
    "call",
    "Switch",
    "Partial",
    "Return",
    "raise",
    "SaveGraph",
    "InsertGradientOf",
    "HookBackward",
    "DataQueue",
    "GetNext",
    "DynamicShape",
    "FileRead",
    "LoadIm2Col",
    "resolve",
    "getattr",
    "Save",
    "_Host",
    "EnvironCreate",
    "StandardNormal",
    "AllToAllv",
    "Send",
    "Receive",
]  # primitives that MindSpore has, or could have, and no graph of ours
FUNCTIONS = (
    "/tmp/evil.so:Product",
    "./evil.so:Product",
    "graphs/evil/evil.mindir:Product",
    "msconv-native-1:system",
    "msconv-native-1:Threads",
    "msconv-native-1:Product:Product",
    "msconv-native-1",
    ":Product",
    "libc.so.6:system",
    "msconv-native-2:Product",
    "msconv-native-1:../../evil",
    "MSCONV-NATIVE-1:Product",
    "msconv-native-1 :Product",
)

Forge = Callable[[Any, random.Random], object]


def some_node(m: Any, rng: random.Random) -> Any:
    return rng.choice([n for n in m.graph.node if n.op_type != "Constant"])


def some_primitive(m: Any, rng: random.Random, attributes: bool = False) -> Any:
    return rng.choice([p for p in m.primitives if p.attribute or not attributes])


def forbidden_primitive(m: Any, rng: random.Random) -> None:
    p = some_primitive(m, rng)
    p.op_type = rng.choice(KINDS)


def added_primitive(m: Any, rng: random.Random) -> None:
    kind = rng.choice(KINDS)
    m.primitives.add(name=f"{kind}:1", op_type=kind, instance_name="run", prim_type=rng.choice((1, 2)))
    some_node(m, rng).op_type = f"REF::{kind}:1"


def inline_node(m: Any, rng: random.Random) -> None:
    n = some_node(m, rng)
    n.op_type = rng.choice(("Custom", "Print", "PyExecute", "call", "Constant", "REF::", "REF::Custom:0"))
    n.attribute.add(name="func_name", type=TYPES.Value("STRING"), s=rng.choice(FUNCTIONS).encode())


def kernel_elsewhere(m: Any, rng: random.Random) -> None:
    p = some_primitive(m, rng)
    if p.op_type != "Custom":
        p.op_type, p.name, p.prim_type = "Custom", "Custom:99", 1
        del p.attribute[:]
        for name in ("func_name", "func_type", "reg_op_name"):
            p.attribute.add(name=name, type=TYPES.Value("STRING"), s=b"aot")
    for a in p.attribute:
        if a.name == "func_name":
            a.s = rng.choice(FUNCTIONS).encode()


def attribute_of_its_own(m: Any, rng: random.Random) -> None:
    a = some_primitive(m, rng).attribute.add(name=rng.choice(("func_name", "path", "fn", "file", "x", "")))
    a.type, a.s = TYPES.Value("STRING"), b"/etc/passwd"


def attribute_lost(m: Any, rng: random.Random) -> None:
    holder = rng.choice([*m.graph.node, *(p for p in m.primitives if len(p.attribute) == 1)])
    del holder.attribute[:]


def attribute_of_another_value(m: Any, rng: random.Random) -> None:
    a = rng.choice(some_primitive(m, rng, attributes=True).attribute)
    a.type = rng.choice([t for t in TYPES.values() if t != a.type])


def attribute_of_another_content(m: Any, rng: random.Random) -> None:
    a = rng.choice(
        [a for p in m.primitives for a in p.attribute if a.values or a.s or a.type == TYPES.Value("BOOL")]
    )
    if a.values:
        a.values.add().CopyFrom(a.values[0])
    elif a.s:
        a.s = a.s + b"x"
    else:
        a.i = 1 - a.i


def sub_graph(m: Any, rng: random.Random) -> None:
    a = rng.choice(m.graph.node).attribute[0]
    rng.choice(
        (
            lambda: a.g.CopyFrom(pb.GraphProto(name="g")),
            lambda: a.graphs.add(name="g"),
            lambda: m.functions.add(name="f"),
            lambda: setattr(a.functor, "name", "f"),
            lambda: a.graph_holder.scalar_node.add(scalar_op_type=1),
        )
    )()


def other_parts(m: Any, rng: random.Random) -> None:
    rng.choice(
        (
            lambda: m.preprocessor.op.add(op_type="Decode"),
            lambda: m.parallel.layout.add(name="l"),
            lambda: m.user_info.update(k="v"),
            lambda: setattr(m, "doc_string", "d"),
            lambda: setattr(m, "domain", "d"),
            lambda: setattr(m.graph, "bprop_filepath", "/tmp/evil"),
            lambda: setattr(m.graph, "bprop_hash", "x"),
            lambda: setattr(m.graph, "name", "x"),
            lambda: m.graph.node[0].primal_attr.add(name="x"),
            lambda: setattr(m, "little_endian", False),
            lambda: setattr(m, "mind_ir_version", 2),
            lambda: setattr(m, "ir_version", "9"),
            lambda: setattr(m, "producer_name", "x"),
            lambda: setattr(m, "model_version", "x/y"),
        )
    )()


def data_elsewhere(m: Any, rng: random.Random) -> None:
    tensors = [t for n in m.graph.node for a in n.attribute for t in a.tensors]
    t = rng.choice([*m.graph.parameter, *tensors])
    t.external_data.location, t.external_data.length = "/etc/passwd", rng.choice((0, 1, 1 << 40))


def other_parameter(m: Any, rng: random.Random) -> None:
    p = rng.choice(m.graph.parameter)
    rng.choice(
        (
            lambda: setattr(p, "name", p.name + "x"),
            lambda: p.dims.append(1),
            lambda: p.dims.__setitem__(0, 2**40),
            lambda: p.dims.__setitem__(0, -1),
            lambda: setattr(p, "data_type", 9),
            lambda: setattr(p, "raw_data", b"x"),
            lambda: m.graph.parameter.add().CopyFrom(p),
            lambda: m.graph.parameter.remove(p),
            lambda: setattr(p, "compression_type", 1),
            lambda: p.float_data.append(1),
        )
    )()


def other_input(m: Any, rng: random.Random) -> None:
    i = rng.choice(m.graph.input)
    rng.choice(
        (
            lambda: setattr(i, "name", "x"),
            lambda: i.tensor[0].dims.append(7),
            lambda: m.graph.input.remove(i),
            lambda: setattr(i.tensor[0], "data_type", 1 if i.tensor[0].data_type == 6 else 6),
            lambda: i.tensor.add(),
            lambda: i.attr_info.values.add(),
            lambda: m.graph.input.add().CopyFrom(i),
        )
    )()


def other_output(m: Any, rng: random.Random) -> None:
    o = m.graph.output[0]
    rng.choice(
        (
            lambda: setattr(o, "name", "n0"),
            lambda: o.tensor[0].dims.__setitem__(1, 7),
            lambda: o.tensor.add(),
            lambda: m.graph.output.add().CopyFrom(o),
            lambda: m.graph.output.remove(o),
            lambda: setattr(o.tensor[0], "data_type", 16),
        )
    )()


def other_wiring(m: Any, rng: random.Random) -> None:
    n = some_node(m, rng)
    last = m.graph.node[-1].output[0]
    later = last if n.output[0] == last else "n99999"
    rng.choice(
        (
            lambda: n.input.append(n.output[0]),
            lambda: n.input.__setitem__(0, later),
            lambda: n.output.append("n1"),
            lambda: m.graph.node.remove(n),
            lambda: m.graph.node.add().CopyFrom(n),
            lambda: setattr(n, "name", "x"),
            lambda: setattr(n, "domain", "x"),
            lambda: n.ClearField("input"),
            lambda: n.output.__setitem__(0, "n99999"),
        )
    )()


def other_result(m: Any, rng: random.Random) -> None:
    n = rng.choice([n for n in m.graph.node if n.op_type != "Constant" and n.attribute[0].tensors])
    t = n.attribute[0].tensors[0]
    rng.choice(
        (
            lambda: t.dims.extend([1] * 9),
            lambda: t.dims.extend([2**30, 2**30, 2**30]),
            lambda: t.dims.append(-7),
            lambda: setattr(t, "data_type", rng.choice((0, 8, 14, 99))),
            lambda: setattr(t, "raw_data", b"x"),
            lambda: n.attribute[0].tensors.add(),
            lambda: n.node_attr.add(name="x"),
            lambda: n.ClearField("attribute"),
            lambda: setattr(n.attribute[0], "name", "value"),
        )
    )()


def other_constant(m: Any, rng: random.Random) -> None:
    n = rng.choice([n for n in m.graph.node if n.op_type == "Constant"])
    a = n.attribute[0]
    kinds = [TYPES.Value(n) for n in ("STRING", "TENSOR", "GRAPH", "DICT", "CLASS_TYPE", "FUNCTOR", "SYMBOL")]
    rng.choice(
        (
            lambda: setattr(a, "type", rng.choice(kinds)),
            lambda: setattr(a, "name", "x"),
            lambda: n.input.append("n0"),
            lambda: a.strings.append(b"x"),
            lambda: setattr(a, "ref_attr_name", "x"),
            lambda: a.tensors.add(dims=[2**40], data_type=1, raw_data=b"1234"),
            lambda: n.attribute.add().CopyFrom(a),
        )
    )()


def deep(m: Any, rng: random.Random) -> None:
    a = rng.choice([a for n in m.graph.node for a in n.attribute])
    a.type = TYPES.Value("TUPLE")
    for _ in range(rng.choice((1, 3, 90))):
        a.type = TYPES.Value("TUPLE")
        a = a.values.add(type=TYPES.Value("TUPLE"))


def many(m: Any, rng: random.Random) -> None:
    n = some_node(m, rng)
    rng.choice(
        (
            lambda: n.input.extend(["n0"] * 5000),
            lambda: n.attribute[0].values.extend(pb.AttributeProto(type=7, ints=[1]) for _ in range(5000)),
            lambda: m.primitives.extend(list(m.primitives)),
            lambda: m.graph.node.extend(list(m.graph.node)),
        )
    )()


FORGES: tuple[Forge, ...] = (
    forbidden_primitive,
    added_primitive,
    inline_node,
    kernel_elsewhere,
    attribute_of_its_own,
    attribute_lost,
    attribute_of_another_value,
    attribute_of_another_content,
    sub_graph,
    other_parts,
    data_elsewhere,
    other_parameter,
    other_input,
    other_output,
    other_wiring,
    other_result,
    other_constant,
    deep,
    many,
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Other bytes: bits turned, cut, doubled, or a length that is longer than the file."""
    out = bytearray(data)
    kind, at = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        for _ in range(rng.choice((1, 1, 1, 3, 20))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        del out[at : at + rng.randrange(1, 40)]
    elif kind == 3:
        out[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 4:
        out[at : at + 1] = varint(rng.choice((1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)))
    else:
        end = at + rng.randrange(1, 400)
        out[end:end] = out[at:end]
    return bytes(out)


def meaning(data: bytes) -> Any:
    """What a graph is but for the values of its constants, which nodes feed which, and shapes that MindSpore
    infers anew; None if these bytes are none.  Read by MindSpore's own classes."""
    try:
        model = pb.ModelProto.FromString(data)
    except Exception:
        return None
    model.model_version = "2.10.0"
    for primitive in model.primitives:
        primitive.instance_name = ""
    for node in model.graph.node:
        count = len(node.input)
        node.input[:] = ["x"] * count
        for attribute in node.attribute:
            if node.op_type == "Constant":
                attribute.Clear()
            for t in (*attribute.tensors, *(t for v in attribute.values for t in v.tensors)):
                t.Clear()
    for given in (*model.graph.parameter, *(t for i in model.graph.input for t in i.tensor)):
        given.ref_key = ""
    return model

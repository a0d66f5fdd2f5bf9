"""Exporting a cell as a MindIR without weight bytes.  All use of MindSpore's private interface is here.

The executor's own proto names parameters with shapes and types; `mindspore.export` would add their bytes.
Tested with mindspore 2.8.0 and 2.10.0.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import mindspore as ms
from mindspore import Tensor

from msconv_runtime.artifact import GraphInput, GraphOutput, GraphParameter

from ..families.config import DecoderConfig
from ..layout.cuts import Mesh
from .decoder import Decoder
from .ops.ascend import Ascend310POps, AscendOps
from .ops.base import Ops
from .ops.cpu import CpuOps
from .ops.native import NativeOps
from .parameters import restore_names
from .spec import TP_GROUP, Exported, Local

OPS: dict[str, type[Ops]] = {
    "cpu": CpuOps,
    "ascend910b": AscendOps,
    "ascend910c": AscendOps,
    "ascend310p": Ascend310POps,
}
DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16, "int32": ms.int32}
NAMES = {v: k for k, v in DTYPES.items()}


def export(config: DecoderConfig, mesh: Mesh, target: Any, role: Any, variant: str, stored: str = "") -> Exported:
    """Compile one phase for one target: front end and shape inference, on any machine.  `stored`: what matrices
    are stored as; native graphs read them so."""
    from mindspore.nn.utils import no_init_parameters

    try:
        from mindspore.graph.api import _cell_graph_executor as executor
    except ImportError:  # 2.8.0
        from mindspore.common.api import _cell_graph_executor as executor

    ms.set_context(mode=ms.GRAPH_MODE)
    phase = "native" if variant else {"verify": "decode_all"}.get(role.name, role.name)
    local = Local(config, mesh, phase, stored)
    with no_init_parameters():
        ops = NativeOps(local) if phase == "native" else OPS[target.name](local)
        net = Decoder(ops, local)
    parameters = restore_names(net)
    inputs = ops.inputs() + cache_inputs(ops, local)
    net.set_grad(False)
    graph_id, _ = executor.compile(net, *placeholders(inputs), phase="export.mindir", do_convert=False)
    proto, kinds = canonical(executor._get_func_graph_proto(net, graph_id, "mind_ir"))
    return Exported(
        proto=proto,
        nodes=sum(kinds.values()),
        kinds=kinds,
        inputs=inputs,
        outputs=[GraphOutput("logits", "float32", [None, config.vocab])],
        parameters=[GraphParameter(p.name, NAMES[p.dtype], list(p.shape)) for p in parameters],
        groups=[TP_GROUP] if mesh.tp > 1 else [],
        nz=ops.matrices if ops.wants_nz else [],
    )


def cache_inputs(ops: Ops, local: Local) -> list[GraphInput]:
    """Each layer's caches: k0, v0, k1, v1, ... of [pages, page, K, D], or one latent of [pages, page, 1, R]."""
    return [
        GraphInput(f"{kind}_cache.{layer}", NAMES[ops.dtype], [None, ops.page, heads, width], "cache")
        for layer in range(local.config.layers)
        for kind, heads, width in ops.caches()
    ]


def placeholders(inputs: list[GraphInput]) -> list[Tensor]:
    """Tensors with dynamic dimensions, no data."""
    return [Tensor(shape=list(i.shape), dtype=DTYPES[i.dtype]) for i in inputs]


def canonical(proto: bytes) -> tuple[bytes, dict[str, int]]:
    """The same graph under names of our own, so that the same input gives the same bytes; and its nodes by kind.

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

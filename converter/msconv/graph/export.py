"""Exporting a cell as a MindIR without weight bytes.  All use of MindSpore's private interface is here.

The executor's own proto names parameters with shapes and types; `mindspore.export` would add their bytes.
Tested with mindspore 2.8.0 and 2.10.0.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import mindspore as ms
from mindspore import Tensor

from msconv_runtime.artifact import GraphInput, GraphParameter
from msconv_runtime.mindir_check.allowed import TP_GROUP
from msconv_runtime.roles import HIDDEN

from ..mindir.canonical import canonical
from .operations import Operations, operations_for
from .parameters import DTYPES, NAMES, restore_names
from .spec import Exported, Local


def export(local: Local) -> Exported:
    """Compile one graph: front end and shape inference, on any machine.  Raises CannotCompute for a model that the
    target's operations do not cover."""
    from mindspore.nn.utils import no_init_parameters

    try:
        from mindspore.graph.api import _cell_graph_executor as executor
    except ImportError:  # 2.8.0
        from mindspore.common.api import _cell_graph_executor as executor

    ms.set_context(mode=ms.GRAPH_MODE)
    with no_init_parameters():
        ops, net, inputs = build(local)
    parameters = restore_names(net)
    net.set_grad(False)
    with _little_garbage():
        graph_id, _ = executor.compile(net, *placeholders(inputs), phase="export.mindir", do_convert=False)
    proto, kinds = canonical(executor._get_func_graph_proto(net, graph_id, "mind_ir"))
    return Exported(
        proto=proto,
        nodes=sum(kinds.values()),
        kinds=kinds,
        inputs=inputs,
        outputs=net.outputs,
        parameters=[GraphParameter(p.name, NAMES[p.dtype], list(p.shape)) for p in parameters],
        groups=[TP_GROUP] if local.mesh.tp > 1 else [],
        nz=ops.nz,
    )


def build(local: Local) -> tuple[Operations, Any, list[GraphInput]]:
    """The network of a role: a cell, the operations that it is made of, and what it takes."""
    ops = operations_for(local)
    net = import_module(f".{local.network}", __package__).build(ops, local)
    hidden = [GraphInput(HIDDEN, local.target.dtype, [None, net.takes], "hidden")] if local.role.is_draft else []
    return ops, net, ops.inputs() + hidden + cache_inputs(ops, net.caches)


def cache_inputs(ops: Operations, caches: list[list[tuple[str, int, int]]]) -> list[GraphInput]:
    """Each layer's caches: k0, v0, k1, v1, ... of [pages, page, K, D], or one latent of [pages, page, 1, R]."""
    return [
        GraphInput(f"{kind}_cache.{layer}", NAMES[ops.dtype], [None, ops.page, heads, width], "cache")
        for layer, of_layer in enumerate(caches)
        for kind, heads, width in of_layer
    ]


@contextmanager
def _little_garbage() -> Iterator[None]:
    """MindSpore collects garbage before each graph, which takes 0.1 s for its own modules and more beside torch's:
    what is there already is left out of that, and is collected as before afterwards."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def placeholders(inputs: list[GraphInput]) -> list[Tensor]:
    """Tensors with dynamic dimensions, no data."""
    return [Tensor(shape=list(i.shape), dtype=DTYPES[i.dtype]) for i in inputs]

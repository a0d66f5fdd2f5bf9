"""Faults planted where they would arise: in weight files, as a wrong converter leaves them, and in graphs, as a
wrong compiler leaves them.  Manifests are sealed again, so that no digest finds them first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from msconv_runtime.artifact import digest_bytes, digest_of, read_manifest, write_manifest
from tests.checkpoints import Bits, read_rank

Ranks = list[dict[str, Bits]]
ALL = ("prefill", "decode", "verify")
CACHED = ("decode", "verify")
FLOAT32, FLOAT16 = 1, 10  # TensorProto.DataType


@dataclass(frozen=True)
class Fault:
    """`place`: a pattern of what a failed proof must name.  `refused`: the graph cannot be run at all, or
    must not be."""

    name: str
    target: str
    place: str
    weights: Callable[[Ranks], None] | None = None
    graph: Callable[[GraphEdit], None] | None = None
    graph_names: tuple[str, ...] = ALL
    refused: bool = False

    def plant(self, root: Path) -> None:
        if self.weights is not None:
            edit_weights(root, self.weights)
        if self.graph is not None:
            edit_graphs(root, self.target, self.graph_names, self.graph)


def edit_weights(root: Path, change: Callable[[Ranks], None]) -> None:
    """Change the stored bits of all ranks, and seal the manifest."""
    manifest = read_manifest(root)
    assert manifest.weights is not None
    ranks = [
        {name: t.bits.copy() for name, t in read_rank(root, rank).items()} for rank in range(manifest.parallel.tp)
    ]
    change(ranks)
    tensors, files = list(manifest.weights.tensors), []
    for file in manifest.weights.files:
        path = root / file.path
        data = bytearray(path.read_bytes())
        digests = []
        for i, entry in enumerate(tensors):
            raw = np.ascontiguousarray(ranks[file.rank][entry.name]).tobytes()
            assert entry.file == 0
            assert len(raw) == entry.nbytes
            data[entry.begin : entry.begin + entry.nbytes] = raw
            ends = np.cumsum(entry.parts)
            parts = [raw[end - size : end] for end, size in zip(ends, entry.parts, strict=True)]
            digests.append(digest_of(map(digest_bytes, parts)))
            changed = [*entry.digests[: file.rank], digests[-1], *entry.digests[file.rank + 1 :]]
            tensors[i] = msgspec.structs.replace(entry, digests=changed)
        path.write_bytes(data)
        header = digest_bytes(bytes(data[: tensors[0].begin]))
        files.append(msgspec.structs.replace(file, digest=digest_of([header, *digests])))
    weights = msgspec.structs.replace(
        manifest.weights, tensors=tensors, files=files, digest=digest_of(f.digest for f in files)
    )
    write_manifest(root, msgspec.structs.replace(manifest, weights=weights))


def edit_graphs(root: Path, target: str, names: tuple[str, ...], change: Callable[[GraphEdit], None]) -> None:
    """Change the graphs of some names, and seal the manifest."""
    manifest = read_manifest(root)
    graphs = list(manifest.graphs)
    for i, graph in enumerate(graphs):
        if graph.target == target and graph.name in names:
            edit = GraphEdit((root / graph.path).read_bytes())
            change(edit)
            data = edit.save()
            (root / graph.path).write_bytes(data)
            graphs[i] = msgspec.structs.replace(graph, size=len(data), digest=digest_bytes(data))
    write_manifest(root, msgspec.structs.replace(manifest, graphs=graphs))


class GraphEdit:
    """A MindIR's nodes, to be rewired."""

    def __init__(self, data: bytes) -> None:
        from mindspore.train import mind_ir_pb2

        self.model: Any = mind_ir_pb2.ModelProto.FromString(data)
        self.nodes: list[Any] = [_copy(n) for n in self.model.graph.node]
        self.inputs = [i.name for i in self.model.graph.input]

    def save(self) -> bytes:
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        data: bytes = self.model.SerializeToString(deterministic=True)
        return data

    def primitive(self, node: Any) -> Any:
        reference = node.op_type.partition("::")[2]
        return next((p for p in self.model.primitives if p.name == reference), None)

    def kind(self, node: Any) -> str:
        return self.primitive(node).op_type if self.primitive(node) is not None else "Constant"

    def made(self, name: str) -> Any:
        """The node that makes a value."""
        return next(n for n in self.nodes if n.output[0] == name)

    def users(self, node: Any, kind: str = "") -> list[Any]:
        return [n for n in self.nodes if node.output[0] in n.input and kind in ("", self.kind(n))]

    def all(self, kind: str, weight: str = "") -> list[Any]:
        """Nodes of a kind in order; with `weight`, those that read it, whichever way it is loaded."""
        loads = {n.output[0] for n in self.nodes if any(i.rpartition(":")[2] == weight for i in n.input)}
        return [n for n in self.nodes if self.kind(n) == kind and (not weight or loads & set(n.input))]

    def one(self, kind: str, weight: str = "") -> Any:
        (node,) = self.all(kind, weight)
        return node

    def product(self, weight: str) -> Any:
        """What a weight's product gives, turned over where the product is of few rows."""
        product = self.one("MatMul", weight)
        return next(iter(self.users(product, "Transpose")), product)

    def add(self, before: Any, kind: str, inputs: list[str]) -> str:
        """Put a node before another; its value's name."""
        if all(p.op_type != kind for p in self.model.primitives):
            self.model.primitives.add(name=f"{kind}:new", op_type=kind)
        primitive = next(p for p in self.model.primitives if p.op_type == kind)
        return self._insert(before, f"REF::{primitive.name}", inputs).output[0]

    def constant(self, before: Any, value: float | tuple[int, ...]) -> str:
        node = self._insert(before, "Constant", [])
        attribute = node.attribute.add(name="value")
        types = attribute.AttributeType
        if isinstance(value, tuple):
            attribute.type = types.Value("TUPLE")
            for item in value:
                attribute.values.add(ints=[item], type=types.Value("INT64"))
        elif isinstance(value, int):
            attribute.i, attribute.type = value, types.Value("INT64")
        else:
            attribute.f, attribute.type = value, types.Value("FLOAT")
        return node.output[0]

    def set(self, node: Any, index: int, value: float | tuple[int, ...]) -> None:
        """Give one node a constant of its own: others share it."""
        node.input[index] = self.constant(node, value)

    def attribute(self, node: Any, name: str, value: int | str) -> None:
        """Change or add an attribute of this node alone."""
        primitive = _copy(self.primitive(node))
        primitive.name += ":changed"
        attribute = next((a for a in primitive.attribute if a.name == name), None)
        attribute = attribute if attribute is not None else primitive.attribute.add(name=name)
        if isinstance(value, int):
            attribute.i, attribute.type = value, attribute.AttributeType.Value("INT64")
        else:
            attribute.s, attribute.type = value.encode(), attribute.AttributeType.Value("STRING")
        self.model.primitives.append(primitive)
        node.op_type = f"REF::{primitive.name}"

    def become(self, node: Any, kind: str) -> None:
        """Another primitive with the same inputs."""
        name = f"{kind}:{node.output[0]}"
        self.model.primitives.add(name=name, op_type=kind)
        node.op_type = f"REF::{name}"

    def rewire(self, old: str, new: str) -> None:
        for node in self.nodes:
            node.input[:] = [new if i == old else i for i in node.input]

    def bypass(self, node: Any, index: int = 0) -> None:
        self.rewire(node.output[0], node.input[index])

    def move_after(self, node: Any, other: Any) -> None:
        self.nodes = [n for n in self.nodes if n is not node]
        self.nodes.insert(self._index(other) + 1, node)

    def _index(self, node: Any) -> int:
        return next(i for i, n in enumerate(self.nodes) if n is node)

    def _insert(self, before: Any, op_type: str, inputs: list[str]) -> Any:
        node = type(before)(input=inputs, op_type=op_type)
        name = f"new{len(self.nodes)}"
        node.output.append(name)
        node.name = name
        self.nodes.insert(self._index(before), node)
        return node


def _copy(message: Any) -> Any:
    out = type(message)()
    out.CopyFrom(message)
    return out

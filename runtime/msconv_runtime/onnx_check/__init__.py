"""ONNX files from a stranger: parsed here, and held against what msconv exports, before any runtime sees them.

A runtime opens whatever file an ONNX file names.  One that passes points at nothing but the bytes that a weight
has by the manifest; its nodes are operators of a closed list, and it takes and gives what its manifest entry says.
Needs no package, and works on every machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..mindir_check.wire import Malformed, read
from . import schema
from .allowed import ALLOWED, GRAPH

if TYPE_CHECKING:
    from ..artifact.manifest import Graph, GraphInput, GraphOutput, Manifest, TensorEntry

PRODUCER = "msconv"
EXTERNAL = 1
BODY = "experts"  # what the graph inside a loop is called
MOST_CONSTANT_BYTES = 1 << 20


def refusal_in(data: bytes, graph: Graph, manifest: Manifest) -> str:
    """Why these bytes are not a graph that msconv exports, with the inputs, outputs and weights of its manifest
    entry; or ""."""
    try:
        _Check(graph, manifest).model(data)
    except Malformed as e:
        return f"is not a graph that msconv makes, and was not loaded: {e}"
    return ""


class _Check:
    """Of one graph."""

    def __init__(self, graph: Graph, manifest: Manifest) -> None:
        self.graph = graph
        self.allowed = ALLOWED[graph.variant]
        weights = manifest.weights
        self.files = [f.path for f in weights.files if f.rank == 0] if weights else []
        self.stored = {t.name: t for t in weights.tensors} if weights else {}
        self.kinds: Counter[str] = Counter()

    def model(self, data: bytes) -> None:
        found = read(data, schema.MODEL, "the file")
        if found.get("producer_name") != PRODUCER or found.get("ir_version") != self.allowed.ir_version:
            raise Malformed(f"the file: ir_version {found.get('ir_version')}, or made by somebody else")
        opsets = [read(o, schema.OPSET, "the file") for o in found["opset_import"]]
        if len(opsets) != 1 or opsets[0].get("domain") or opsets[0].get("version") != self.allowed.opset:
            raise Malformed(f"the file: has other operators than those of opset {self.allowed.opset}")
        graph = read(found.get("graph", b""), schema.GRAPH, "the graph")
        if graph.get("name") != PRODUCER:
            raise Malformed("the graph: has another name than msconv")
        known = self.initializers(graph["initializer"])
        known |= self.values("input", graph["input"], self.graph.inputs)
        known = self.nodes(graph["node"], known)
        if missing := self.values("output", graph["output"], self.graph.outputs) - known:
            raise Malformed(f"the graph: no node gives {sorted(missing)[0][:80]!r}")
        if self.kinds.total() != self.graph.nodes or dict(self.kinds) != self.graph.kinds:
            raise Malformed("the graph: has nodes of other kinds or number than the manifest says")

    def initializers(self, many: list[bytes]) -> set[str]:
        """Their names: constants of the file's own, and the weights that the manifest says, each once."""
        wanted = {p.name: p for p in self.graph.reads}
        names: set[str] = set()
        for data in many:
            found = read(data, schema.TENSOR, "an initializer")
            name = found.get("name", "")
            what = f"the initializer {name[:80]!r}"
            if not name or name in names:
                raise Malformed(f"{what}: is there twice, or has no name")
            names.add(name)
            if "data_location" not in found:
                self.constant(found, what, name in self.stored)
                continue
            parameter = wanted.pop(name, None)
            entry = self.stored.get(name)
            if (
                parameter is None
                or entry is None
                or (entry.dtype, entry.shape) != (parameter.dtype, parameter.shape)
            ):
                raise Malformed(f"{what}: is not the weight that the manifest says the graph reads")
            self.external(found, what, entry)
        if wanted:
            raise Malformed(f"the graph: lacks the weights {sorted(wanted)[:5]} of the manifest")
        return names

    def constant(self, found: dict[str, Any], what: str, is_weight: bool) -> None:
        item = schema.BYTES.get(found.get("data_type", 0), 0)
        size = math.prod(found["dims"]) * item
        fits = item and not found["external_data"] and len(found.get("raw_data", b"")) == size
        if is_weight or not fits or not 0 < size <= MOST_CONSTANT_BYTES:
            raise Malformed(f"{what}: is no constant, or has other bytes than its shape says")

    def external(self, found: dict[str, Any], what: str, entry: TensorEntry) -> None:
        """It is exactly where the manifest has the weight, in the type and shape that it has there."""
        pairs = [read(e, schema.ENTRY, what) for e in found["external_data"]]
        place = {"location": self.files[entry.file], "offset": str(entry.begin), "length": str(entry.nbytes)}
        if [(p.get("key"), p.get("value")) for p in pairs] != list(place.items()):
            raise Malformed(f"{what}: does not point at its bytes in {place['location']}")
        right = (schema.ELEMENTS.get(entry.dtype), entry.shape, EXTERNAL)
        if "raw_data" in found or (found.get("data_type"), found["dims"], found["data_location"]) != right:
            raise Malformed(f"{what}: has another type or shape than {entry.dtype} {entry.shape}")

    def values(self, kind: str, many: list[bytes], wanted: Iterable[GraphInput | GraphOutput]) -> set[str]:
        """Names of the graph's inputs or outputs: those of the manifest, in order."""
        found = [schema.value(data, f"{kind} {i}") for i, data in enumerate(many)]
        expected = [(v.name, schema.ELEMENTS.get(v.dtype), v.shape) for v in wanted]
        if found != expected:
            odd = next((f for f, e in zip(found, expected, strict=False) if f != e), (f"{len(found)} of them",))
            raise Malformed(f"the graph: {kind}s are not the manifest's: {odd[0][:80]!r}")
        return {name for name, _, _ in found}

    def nodes(self, many: list[bytes], known: set[str]) -> set[str]:
        """What is known after them: each takes what is known before it and gives new values."""
        known = set(known)
        for i, data in enumerate(many):
            found = read(data, schema.NODE, f"node {i}")
            kind = found.get("op_type", "")
            what = f"node {i} ({kind[:40]})"
            allowed = self.allowed.operators.get(kind)
            if allowed is None:
                raise Malformed(f"{what}: no graph of this form has such an operator")
            takes, gives = found["input"], found["output"]
            counts = ((len(takes), allowed.inputs), (len(gives), allowed.outputs))
            if any(not least <= n <= most for n, (least, most) in counts):
                raise Malformed(f"{what}: has {len(takes)} inputs and {len(gives)} outputs")
            if not known.issuperset(takes) or known.intersection(gives) or not all(gives):
                raise Malformed(f"{what}: takes what no earlier node gives, or gives what is there")
            if len(set(gives)) != len(gives):
                raise Malformed(f"{what}: gives a value twice")
            self.attributes(found["attribute"], allowed.attributes, what, known)
            known.update(gives)
            self.kinds[kind] += 1
        return known

    def attributes(self, many: list[bytes], allowed: Any, what: str, known: set[str]) -> None:
        seen: set[str] = set()
        for data in many:
            name, kind, value = schema.attribute(data, what)
            if allowed.get(name) != kind or name in seen:
                raise Malformed(f"{what}: has the attribute {name[:40]!r} twice, or must not have it")
            seen.add(name)
            if kind == GRAPH:
                self.body(value, f"the graph inside {what}", known)

    def body(self, data: bytes, what: str, known: set[str]) -> None:
        """A graph in a node: it sees what is known outside, and has no initializers of its own."""
        found = read(data, schema.GRAPH, what)
        takes, gives = ([schema.value(v, what)[0] for v in found[k]] for k in ("input", "output"))
        if found.get("name") != BODY or found["initializer"] or known.intersection(takes) or not all(takes):
            raise Malformed(f"{what}: is none that msconv makes")
        inside = self.nodes(found["node"], known | set(takes))
        if not inside.issuperset(gives):
            raise Malformed(f"{what}: gives what none of its nodes does")

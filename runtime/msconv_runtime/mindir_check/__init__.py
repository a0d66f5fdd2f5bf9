"""Graphs from a stranger: a MindIR is parsed here, and held against what msconv exports, before MindSpore sees it.

MindSpore runs whatever code a graph names.  A graph that passes names none but our own kernels: it is flat, its
nodes are primitives of a closed list with the attributes that the exporter writes, and it takes and gives what its
manifest entry says.  Knows no MindSpore, and works on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError
from ..targets import TARGETS
from . import schema
from .allowed import (
    ALLOWED,
    FUSED,
    GRAPH_ATTRIBUTES,
    GROUP,
    KERNELS,
    LIBRARY,
    RANKS,
    TP_GROUP,
    Attributes,
    Primitive,
    Value,
)
from .schema import DTYPES
from .wire import Malformed, read

if TYPE_CHECKING:
    from ..artifact.manifest import Graph, GraphOutput, Manifest

MODEL = {
    "ir_version": ("1.0", "1.1"),  # of MindSpore 2.8 and 2.10
    "producer_name": ("MindSpore",),
    "little_endian": (1,),
    "mind_ir_version": (3,),
}
VERSION = re.compile(r"\d+\.\d+\.\d+[\w.+-]{0,40}", re.ASCII)
NUMBERED = re.compile(r"\w{1,64}:\d{1,9}(?::\w{1,20})?", re.ASCII)
NAME = re.compile(r"\w{0,64}", re.ASCII)
KERNEL = re.compile(r"(msconv-native-\d{1,9}):\w{1,64}", re.ASCII)
PREFIX = "msconv:"
CHECKPOINT: dict[str, Value] = {"checkpoint": True}


def check_mindir(path: Path | str, data: bytes, graph: Graph, ranks: int) -> None:
    """Raises ArtifactError unless these bytes of `path` are a graph that msconv exports, with the inputs, outputs
    and weights of its manifest entry, for so many ranks."""
    if problem := refusal(data, graph, ranks):
        raise ArtifactError(
            f"{path}: {problem}.",
            "Compile it again: `msconv compile`.  If the artifact came from elsewhere, do not trust that place.",
        )


def refusal(data: bytes, graph: Graph, ranks: int) -> str:
    """Why `check_mindir` refuses these bytes, or ""."""
    try:
        _Check(graph, ranks).model(data)
    except Malformed as e:
        return f"is not a graph that msconv makes, and was not loaded: {e}"
    return ""


def refusal_in(data: bytes, graph: Graph, manifest: Manifest) -> str:
    """The same, of a graph in an artifact."""
    return refusal(data, graph, manifest.parallel.tp)


def kind_of(target: str, variant: str) -> str:
    """Which table of primitives a graph is held against: those of operations, or compiled."""
    return variant or TARGETS[target].operations


class _Check:
    """Of one graph.  `what` in messages is the part of the file that is wrong."""

    def __init__(self, graph: Graph, ranks: int) -> None:
        self.graph, self.ranks = graph, ranks
        self.allowed = dict(ALLOWED[kind_of(graph.target, graph.variant)])
        for fusion in graph.fused:
            self.allowed |= FUSED.get(fusion, {})
        self.primitives: dict[bytes, tuple[Primitive, str]] = {}
        self.results: dict[bytes, str] = {}  # attributes that were read: the same come again and again
        self.constants: set[bytes] = set()
        self.node_attributes: set[bytes] = set()
        self.kinds: Counter[str] = Counter()

    def model(self, data: bytes) -> None:
        found = read(data, schema.MODEL, "the file")
        for name, values in MODEL.items():
            if found.get(name) not in values:
                raise Malformed(f"the file: {name} is {found.get(name)!r:.60}, not {values[-1]!r}")
        if not VERSION.fullmatch(found.get("model_version", "")) or "graph" not in found:
            raise Malformed("the file: has no graph, or none of a version of MindSpore")
        for primitive in found["primitives"]:
            self.primitive(primitive)
        self.nodes(data, *found["graph"])

    def primitive(self, data: bytes) -> None:
        found = read(data, schema.PRIMITIVE, "a primitive")
        name, kind = found.get("name", ""), found.get("op_type", "")
        what = f"the primitive {name[:60]!r}"
        attributes = schema.attributes(found["attribute"], what)
        title = kind
        if kind == "Custom":
            title = _kernel(attributes.get("func_name"), what)
        known = self.allowed.get(title)
        if known is None:
            raise Malformed(f"{what}: no graph for {self.graph.target} has a {title[:60] or 'nameless one'}")
        if (
            not NUMBERED.fullmatch(name)
            or not name.startswith(f"{kind}:")
            or not NAME.fullmatch(found.get("instance_name", ""))
        ):
            raise Malformed(f"{what}: has a name that no exporter gives")
        if found.get("prim_type") != (2 if known.is_function else 1):
            raise Malformed(f"{what}: is of prim_type {found.get('prim_type')}")
        if not any(self._same(attributes, wanted) for wanted in known.attributes):
            raise Malformed(f"{what}: has other attributes than a {title} may have: {_shown(attributes)}")
        reference = f"REF::{name}".encode()
        if reference in self.primitives:
            raise Malformed(f"{what}: is there twice")
        self.primitives[reference] = (known, title)

    def _same(self, found: dict[str, Value], wanted: Attributes) -> bool:
        filled: dict[str, Value] = {GROUP: TP_GROUP, RANKS: self.ranks}
        expected = {n: filled.get(v, v) if isinstance(v, str) else v for n, v in wanted.items()}
        return found.keys() == expected.keys() and all(_equal(found[n], v) for n, v in expected.items())

    def nodes(self, data: bytes, begin: int, end: int) -> None:
        found = read(data, schema.GRAPH, "the graph", begin, end)
        if (found.get("name"), found.get("bprop_hash"), found.get("bprop_filepath")) != ("msconv", "", ""):
            raise Malformed("the graph: has another name than msconv, or names a file")
        attributes = schema.attributes(found["attribute"], "the graph")
        if unknown := {n: v for n, v in attributes.items() if not _equal(v, GRAPH_ATTRIBUTES.get(n))}:
            raise Malformed(f"the graph: has attributes that no graph has: {_shown(unknown)}")
        known = {*self.parameters(found["parameter"]), *self.inputs(found["input"])}
        for i, node in enumerate(found["node"]):
            known.add(self.node(i, node, known))
        self.output(found["output"], len(found["node"]))
        self.counts(len(found["node"]))

    def parameters(self, many: list[bytes]) -> list[bytes]:
        """Their names.  They are the weights that the manifest says, each once."""
        wanted = {p.name: p for p in self.graph.reads}
        names = []
        for data in many:
            found = schema.tensor(data, "a parameter", "name", "ref_key", "compression_type")
            name = found.get("name", "")
            expected = wanted.pop(name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
            if expected is None:
                raise Malformed(f"the parameter {name[:80]!r}: is there twice, or not in the manifest")
            self._fits(f"the parameter {name!r:.80}", found, expected.dtype, expected.shape)
            if found.get("compression_type") != 0:
                raise Malformed(f"the parameter {name[:80]!r}: is compressed")
            names.append(name.encode())
        if wanted:
            raise Malformed(f"the graph: lacks the parameters {sorted(wanted)[:5]} of the manifest")
        return names

    def inputs(self, many: list[bytes]) -> list[bytes]:
        wanted = self.graph.inputs
        if len(many) != len(wanted):
            raise Malformed(f"the graph: takes {len(many)} inputs, {len(wanted)} by the manifest")
        names = []
        for i, (data, expected) in enumerate(zip(many, wanted, strict=True)):
            what = f"input {i}"
            found = read(data, schema.VALUE, what)
            if found.get("name") != f"{PREFIX}inputs{i}" or len(found["tensor"]) != 1 or len(found) != 2:
                raise Malformed(f"{what}: has the name {found.get('name', '')[:60]!r}, or not one type")
            held = schema.tensor(found["tensor"][0], what, "ref_key")
            self._fits(what, held, expected.dtype, expected.shape)
            names.append(found["name"].encode())
        return names

    def output(self, many: list[bytes], nodes: int) -> None:
        """One value, the last node's, as wide as the manifest says: a tensor, or a tuple of several."""
        if len(many) != 1:
            raise Malformed(f"the graph: gives {len(many)} values, not one")
        found = read(many[0], schema.VALUE, "the output")
        if found.get("name") != f"n{nodes - 1}":
            raise Malformed("the output: is not what the last node gives")
        if "attr_info" in found:
            if found["tensor"] or found.get("denotation") != "Tuple":
                raise Malformed("the output: is a tuple and something else")
            given = schema.tuple_of_tensors(found["attr_info"], "the output")
        else:
            if len(found["tensor"]) != 1 or "denotation" in found:
                raise Malformed("the output: is not one tensor")
            given = [schema.tensor(found["tensor"][0], "the output")]
        if len(given) != len(self.graph.outputs):
            raise Malformed(f"the graph: gives {len(given)} outputs, {len(self.graph.outputs)} by the manifest")
        for held, expected in zip(given, self.graph.outputs, strict=True):
            self._fits_output(held, expected)

    def _fits_output(self, held: dict[str, Any], expected: GraphOutput) -> None:
        given = held["dims"]
        shape = [n if n is not None or not i else given[i] for i, n in enumerate(expected.shape[: len(given)])]
        if len(shape) != len(expected.shape):
            raise Malformed(f"the output: has the shape {given}, not {expected.shape}")
        self._fits("the output", held, expected.dtype, shape)

    def _fits(self, what: str, held: dict[str, Any], dtype: str, shape: Any) -> None:
        expected = [-1 if n is None else n for n in shape]
        if held["data_type"] != DTYPES.get(dtype) or held["dims"] != expected:
            raise Malformed(
                f"{what}: has type {held['data_type']} and shape {held['dims']}, not {dtype} and {expected}"
            )

    def node(self, index: int, data: bytes, known: set[bytes]) -> bytes:
        """The name of what it gives."""
        what = f"node {index}"
        found = read(data, schema.NODE, what)
        name = b"n%d" % index
        if found["output"] != [name] or found.get("name") != name or found.get("domain") != b"":
            raise Malformed(f"{what}: does not give n{index}, or has a name of its own")
        if len(found["attribute"]) != 1:
            raise Malformed(f"{what}: has {len(found['attribute'])} attributes, not one")
        attribute, kind = found["attribute"][0], found.get("op_type", b"")
        if kind == b"Constant":
            if found["input"] or found["node_attr"]:
                raise Malformed(f"{what}: is a constant with inputs")
            if attribute not in self.constants:
                schema.constant(attribute, what)
                self.constants.add(attribute)
            self.kinds["Constant"] += 1
            return name
        if kind not in self.primitives:
            raise Malformed(f"{what}: {kind[:60]!r} is no primitive of this graph")
        primitive, title = self.primitives[kind]
        count = len(found["input"])
        if not primitive.inputs[0] <= count <= primitive.inputs[1] or not known.issuperset(found["input"]):
            raise Malformed(f"{what}: a {title} with {count} inputs, or with one that no earlier node gives")
        if attribute not in self.results:
            self.results[attribute] = schema.result(attribute, what)
        if self.results[attribute] not in primitive.results:
            raise Malformed(f"{what}: a {title} that gives a {self.results[attribute]}")
        marks = found["node_attr"]
        if len(marks) > 1 or (marks and marks[0] not in self.node_attributes):
            if schema.attributes(marks, what) != CHECKPOINT:
                raise Malformed(f"{what}: has node attributes that no graph has")
            self.node_attributes.update(marks)
        self.kinds[title] += 1
        return name

    def counts(self, nodes: int) -> None:
        """As the manifest has them; what no node uses has no reason to be there."""
        if unused := {title for _, title in self.primitives.values()} - self.kinds.keys():
            raise Malformed(f"the graph: no node is a {sorted(unused)[0][:60]}, which it has a primitive for")
        if nodes != self.graph.nodes or (self.graph.kinds and dict(self.kinds) != self.graph.kinds):
            raise Malformed(f"the graph: has {nodes} nodes of other kinds or number than the manifest says")


def _kernel(function: Value | None, what: str) -> str:
    """The title of a compiled kernel.  Raises Malformed for what is none of ours."""
    text = function if isinstance(function, str) else ""
    library, _, name = text.partition(":")
    if KERNEL.fullmatch(text) and library != LIBRARY:
        raise Malformed(f"{what}: wants the kernels {library}; these are {LIBRARY}")
    if library != LIBRARY or name not in KERNELS:
        raise Malformed(f"{what}: calls {text[:80]!r}, which is no kernel of ours")
    return text


def _equal(found: Value, wanted: Value | None) -> bool:
    """1 is not true."""
    return type(found) is type(wanted) and found == wanted


def _shown(attributes: dict[str, Value]) -> str:
    return ", ".join(f"{name[:40]!r}: {value!r:.60}" for name, value in list(attributes.items())[:6])

"""ONNX files are held against what msconv exports before any runtime sees them: ours pass, none that is forged."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper

from msconv.verify.onnx import runners
from msconv_runtime.artifact import Artifact, Graph, Manifest, digest_bytes, read_manifest
from msconv_runtime.artifact.integrity import check_artifact
from msconv_runtime.errors import ArtifactError
from msconv_runtime.onnx_check import refusal_in
from msconv_runtime.onnx_check.allowed import ALLOWED
from tests.onnx_files.making import FAMILIES, TWO_LAYERS, with_graphs

Forge = Callable[[Any], object]
Named = tuple[bytes, Graph, Manifest]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Named]:
    """Those of all families, with the manifest they are in; and experts of a few tokens, and of many."""
    found = {}
    for family in FAMILIES:
        _, root = with_graphs(tmp_path_factory.mktemp(family), family, **TWO_LAYERS[family])
        manifest = read_manifest(root)
        for graph in manifest.graphs:
            found[family, graph.name] = ((root / graph.path).read_bytes(), graph, manifest)
    return found


def test_every_exported_graph_passes_and_the_list_holds_nothing_else(
    graphs: dict[tuple[str, str], Named], tmp_path: Path
) -> None:
    from msconv.graph.spec import Fixed

    _, root = with_graphs(tmp_path, "qwen3_moe", Fixed(1, 8, 16), num_hidden_layers=1, mlp_only_layers=[])
    manifest = read_manifest(root)
    more = {("few", g.name): ((root / g.path).read_bytes(), g, manifest) for g in manifest.graphs}
    used: dict[str, set[str]] = {variant: set() for variant in ALLOWED}
    for data, graph, of in (graphs | more).values():
        assert refusal_in(data, graph, of) == ""
        used[graph.variant] |= graph.kinds.keys()
    assert {variant: set(allowed.operators) for variant, allowed in ALLOWED.items()} == used


def of(model: Any) -> Any:
    return model.graph


def weight(model: Any) -> Any:
    return next(i for i in model.graph.initializer if i.external_data)


def constant(model: Any) -> Any:
    return next(i for i in model.graph.initializer if not i.external_data)


def entry(model: Any, key: str) -> Any:
    return next(e for e in weight(model).external_data if e.key == key)


def loop(model: Any) -> Any:
    return next(a.g for n in model.graph.node for a in n.attribute if a.name == "body")


def add_function(model: Any) -> None:
    model.functions.append(
        helper.make_function("", "F", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [])
    )


def add_node(kind: str, **more: Any) -> Forge:
    return lambda m: of(m).node.append(helper.make_node(kind, ["input_ids"], ["more"], **more))


FORGES: dict[str, Forge] = {
    "a place above the artifact": lambda m: setattr(entry(m, "location"), "value", "../secret"),
    "an absolute place": lambda m: setattr(entry(m, "location"), "value", "/etc/passwd"),
    "another file of the artifact": lambda m: setattr(entry(m, "location"), "value", "config.json"),
    "another offset": lambda m: setattr(entry(m, "offset"), "value", "8"),
    "more bytes": lambda m: setattr(entry(m, "length"), "value", "999999"),
    "no length": lambda m: weight(m).external_data.pop(),
    "a checksum too": lambda m: weight(m).external_data.add(key="checksum", value="0"),
    "another type": lambda m: setattr(weight(m), "data_type", TensorProto.INT32),
    "another shape": lambda m: weight(m).dims.append(1),
    "a weight of its own bytes": lambda m: (
        weight(m).ClearField("external_data"),
        weight(m).ClearField("data_location"),
        setattr(weight(m), "raw_data", b"\0" * 8),
    ),
    "a weight under another name": lambda m: setattr(weight(m), "name", "else"),
    "a constant that points outside": lambda m: (
        constant(m).ClearField("raw_data"),
        constant(m).external_data.add(key="location", value="/dev/zero"),
        setattr(constant(m), "data_location", TensorProto.EXTERNAL),
    ),
    "a constant with fewer bytes": lambda m: setattr(constant(m), "raw_data", b"1"),
    "a huge constant": lambda m: of(m).initializer.append(
        TensorProto(name="huge", data_type=1, dims=[1 << 40], raw_data=b"")
    ),
    "an operator of another domain": add_node("QMoE", domain="com.microsoft"),
    "an operator of ours of another domain": add_node("Identity", domain="evil"),
    "an operator that draws": add_node("RandomNormalLike"),
    "an operator with a graph": lambda m: of(m).node.append(
        helper.make_node("If", ["input_ids"], ["more"], then_branch=of(m), else_branch=of(m))
    ),
    "an attribute that is none": add_node("Identity", path="/tmp"),
    "an attribute of another kind": add_node("Cast", to="float"),
    "another opset": lambda m: setattr(m.opset_import[0], "version", 21),
    "a second opset": lambda m: m.opset_import.add(domain="com.microsoft", version=1),
    "a function": add_function,
    "metadata": lambda m: m.metadata_props.add(key="a", value="b"),
    "another producer": lambda m: setattr(m, "producer_name", "pytorch"),
    "an input more": lambda m: of(m).input.append(helper.make_tensor_value_info("more", 1, [1])),
    "an input of another shape": lambda m: of(m).input[0].type.tensor_type.shape.dim.add(dim_value=1),
    "an output less": lambda m: of(m).output.pop(),
    "an output that nobody gives": lambda m: (
        of(m).node.pop(),
        of(m).node.append(helper.make_node("Identity", ["input_ids"], ["more"])),
    ),
    "a value that comes later": lambda m: of(m).node.insert(0, helper.make_node("Identity", ["logits"], ["more"])),
    "a value given twice": lambda m: of(m).node.append(helper.make_node("Identity", ["input_ids"], ["logits"])),
    "a node less": lambda m: of(m).node.pop(0),
    "a sparse constant": lambda m: of(m).sparse_initializer.add(),
    "a note": lambda m: setattr(of(m), "doc_string", "hello"),
    "a loop's own constants": lambda m: loop(m).initializer.append(weight(m)),
    "an operator in a loop": lambda m: loop(m).node.append(helper.make_node("Erf", [], ["more"])),
    "a loop that gives what it has not": lambda m: setattr(loop(m).output[1], "name", "more"),
}


@pytest.mark.parametrize("name", FORGES)
def test_nothing_forged_is_taken_for_a_graph(name: str, graphs: dict[tuple[str, str], Named]) -> None:
    """Size, digest and number of nodes in the manifest are the forger's own."""
    told = 0
    for (_, form), (data, graph, manifest) in graphs.items():
        changed = onnx.ModelProto.FromString(data)
        try:
            FORGES[name](changed)
        except StopIteration:  # this one has no loop
            continue
        bad = changed.SerializeToString(deterministic=True)
        own = replace(graph, size=len(bad), digest=digest_bytes(bad), kinds=kinds(changed.graph))
        own = replace(own, nodes=sum(own.kinds.values()))
        problem = refusal_in(bad, own, manifest)
        if name == "a node less" and not problem.startswith("is not a graph"):
            pytest.fail(f"{form}: taken for a graph")
        assert problem.startswith("is not a graph that msconv makes, and was not loaded: "), form
        assert problem.isprintable()
        assert len(problem) < 500
        told += 1
    assert told


def kinds(graph: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
        for kind, count in itertools.chain.from_iterable(
            kinds(a.g).items() for a in node.attribute if a.HasField("g")
        ):
            found[kind] = found.get(kind, 0) + count
    return found


def test_damaged_bytes_are_refused_or_mean_the_same(graphs: dict[tuple[str, str], Named]) -> None:
    """A byte changed, cut or put in anywhere: what passes is another number in a constant or an attribute."""
    rng = random.Random(20261128)
    passed = 0
    for _ in range(600):
        data, graph, manifest = rng.choice(list(graphs.values()))
        at = rng.randrange(len(data))
        bad = rng.choice([data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], data + b"\0"])
        if refusal_in(bad, graph, manifest):
            continue
        passed += 1
        found = onnx.ModelProto.FromString(bad)
        assert found.SerializeToString(deterministic=True) == bad
        assert [i.external_data for i in found.graph.initializer] == [
            i.external_data for i in onnx.ModelProto.FromString(data).graph.initializer
        ]
    assert passed < 150


def test_a_forged_file_reaches_no_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, root = with_graphs(tmp_path, "qwen3", None, num_hidden_layers=1)
    artifact = Artifact(root)
    (graph,) = artifact.manifest.graphs
    model = onnx.load(root / graph.path, load_external_data=False)
    entry(model, "location").value = "../secret"
    bad = model.SerializeToString(deterministic=True)
    (root / graph.path).write_bytes(bad)
    assert [d.problem for d in check_artifact(artifact)] == [
        f"{root / graph.path}: has {len(bad)} bytes, the manifest says {graph.size}."
    ]
    own = replace(graph, size=len(bad), digest=digest_bytes(bad))
    forged = artifact.changed(graphs=[own])
    assert "does not point at its bytes" in check_artifact(forged)[0].problem

    def loaded(*_: object, **__: object) -> None:
        pytest.fail("a forged file was loaded")

    monkeypatch.setattr(onnx.external_data_helper, "load_external_data_for_model", loaded)
    monkeypatch.setattr(onnx.checker, "check_model", loaded)
    for use in (runners.check, *runners.runners().values()):
        with pytest.raises(ArtifactError, match="does not point at its bytes"):
            use(forged, own)

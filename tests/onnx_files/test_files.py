"""What ONNX files hold: no byte of a weight, no dimension of zero, and ONNX's own check passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from msconv.steps.compile import compile_graphs
from msconv_runtime.artifact import Artifact, read_manifest
from msconv_runtime.artifact.integrity import check_artifact
from tests.checkpoints import read_tree
from tests.conversions import convert
from tests.onnx_files.making import FAMILIES, FIXED, TWO_LAYERS, with_graphs


@pytest.fixture(scope="module", params=FAMILIES)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    return with_graphs(tmp_path_factory.mktemp(family), family, **TWO_LAYERS[family], dtype="bfloat16")[1]


def models(root: Path) -> Iterator[tuple[str, Path, Any]]:
    for graph in read_manifest(root).graphs:
        yield graph.name, root / graph.path, onnx.load(root / graph.path, load_external_data=False)


def test_files_lie_in_the_root_and_pass_onnx_checker(root: Path) -> None:
    names = {name: path.name for name, path, _ in models(root)}
    assert names == {
        "mixed": "model.onnx",
        "prefill_static": "prefill_static.onnx",
        "decode_static": "decode_static.onnx",
    }
    for _, path, _ in models(root):
        onnx.checker.check_model(str(path), full_check=True)
    assert check_artifact(Artifact(root)) == []


def test_no_byte_of_a_weight_is_copied(root: Path) -> None:
    """Each weight is where the rank's file has it; what a graph holds itself is small."""
    manifest = read_manifest(root)
    assert manifest.weights is not None
    stored = {t.name: t for t in manifest.weights.tensors}
    for _, path, model in models(root):
        assert path.stat().st_size < 30_000
        external = {i.name: {e.key: e.value for e in i.external_data} for i in model.graph.initializer}
        pointing = {name: place for name, place in external.items() if place}
        assert pointing.keys() == stored.keys()
        for name, place in pointing.items():
            entry = stored[name]
            assert place == {
                "location": manifest.weights.files[entry.file].path,
                "offset": str(entry.begin),
                "length": str(entry.nbytes),
            }
        assert sum(len(i.raw_data) for i in model.graph.initializer) < 2000


def test_fixed_shapes_are_plain_and_nowhere_zero(root: Path) -> None:
    for name, path, model in models(root):
        version = model.opset_import[0].version
        assert [o.domain for o in model.opset_import] == [""]
        if name == "mixed":
            assert version == 23
            assert {"Attention", "RotaryEmbedding", "RMSNormalization"} <= {n.op_type for n in model.graph.node}
            continue
        assert version == 17
        inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
        values = {v.name: v.type.tensor_type.shape.dim for v in (*inferred.value_info, *inferred.output)}
        assert values.keys() >= {o for node in inferred.node for o in node.output}
        for value, dims in {**values, **{v.name: v.type.tensor_type.shape.dim for v in inferred.input}}.items():
            assert all(d.dim_value > 0 for d in dims), value
            assert len(dims) <= 4, value


def test_the_same_bytes_every_time_and_weights_untouched(tmp_path: Path) -> None:
    _, root = with_graphs(tmp_path, "qwen3", num_hidden_layers=1)
    before = read_tree(root)
    compile_graphs(root, "onnx", fixed=FIXED)
    assert read_tree(root) == before
    convert(tmp_path / "source", tmp_path / "again")
    weights = {name: data for name, data in before.items() if name.startswith("weights/")}
    assert {n: d for n, d in read_tree(tmp_path / "again").items() if n.startswith("weights/")} == weights


def test_the_plain_form_goes_when_nobody_asks_for_it(tmp_path: Path) -> None:
    _, root = with_graphs(tmp_path, "qwen3", num_hidden_layers=1)
    mine = root / "mine.onnx"
    mine.write_bytes(b"a file of the user's")
    compile_graphs(root, "onnx")
    assert sorted(p.name for p in root.glob("*.onnx")) == ["mine.onnx", "model.onnx"]
    assert [g.name for g in read_manifest(root).graphs] == ["mixed"]
    convert(tmp_path / "source", root, force=True)
    assert sorted(p.name for p in root.glob("*.onnx")) == ["mine.onnx"]
    assert not (root / "genai_config.json").exists()


def test_genai_config_names_what_the_graph_has(root: Path) -> None:
    """What onnxruntime-genai looks up: `make test-onnx` runs it."""
    manifest = read_manifest(root)
    entry = next(f for f in manifest.files if f.name == "genai_config.json")
    data = (root / entry.name).read_bytes()
    assert entry.size == len(data)
    model = json.loads(data)["model"]
    decoder = model["decoder"]
    graph = next(g for g in manifest.graphs if g.name == "mixed")
    assert decoder["filename"] == graph.path
    keys = [decoder["inputs"][f"past_{k}_names"] % 0 for k in ("key", "value")]
    assert [c.name for c in graph.caches[:2]] == keys
    assert [o.name for o in graph.outputs[1:3]] == [
        decoder["outputs"][f"present_{k}_names"] % 0 for k in ("key", "value")
    ]
    for cache in graph.caches:
        assert (cache.shape[1], cache.shape[3]) == (decoder["num_key_value_heads"], decoder["head_size"])
    assert model["eos_token_id"] == [2]
    assert decoder["num_hidden_layers"] * 2 == len(graph.caches)

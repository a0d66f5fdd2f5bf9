"""Graphs of compiled kernels: these against the interpreter's, and faults planted in the graph."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msconv.mindir.kernels import KERNELS, Context
from msconv.mindir.kernels.compiled import EXPECTED
from msconv.steps.compile import compile_graphs
from msconv.verify.compare import compare
from msconv.verify.prove import prove
from msconv_runtime.artifact import Artifact, read_manifest
from msconv_runtime.errors import EnvironmentProblem, VerificationFailed
from msconv_runtime.kernels import LIBRARY, check, library
from msconv_runtime.kernels.check import call, narrow, upcast
from msconv_runtime.serving.proof import proof_of
from tests.checkpoints import make_qwen3
from tests.conftest import Checkpoints
from tests.conversions import convert
from tests.verify.faults import attention, mlp, name_of
from tests.verify.planting import GraphEdit, edit_graphs

EXACT = Context(True, torch.float32)
Array = Any


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def both(name: str, *inputs: Array) -> tuple[list[Array], list[Array]]:
    """What the compiled kernel and the interpreter's give."""
    tensors = [torch.from_numpy(upcast(a)) for a in inputs]
    expected = KERNELS[f"{LIBRARY}:{name}"].run(EXACT, dict(EXPECTED), *tensors)
    arrays = [e.numpy() for e in (expected if isinstance(expected, tuple) else (expected,))]
    path = library().path
    assert path is not None, library().why
    return call(path, name, inputs, *(a.shape for a in arrays)), arrays


def same(name: str, *inputs: Array) -> None:
    for found, expected in zip(*both(name, *inputs), strict=True):
        largest = max(1.0, float(np.abs(expected).max(initial=0)))
        assert float(np.abs(found - expected).max(initial=0)) < 2e-5 * largest


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


sizes = st.integers(1, 130)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), depth=st.integers(1, 600), width=sizes, half=st.booleans())
def test_product(rows: int, depth: int, width: int, half: bool) -> None:
    weight = normal(1, width, depth) / np.float32(depth**0.5)
    same("Product", normal(0, rows, depth), narrow(weight) if half else weight)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), width=sizes)
def test_what_is_done_row_by_row(rows: int, width: int) -> None:
    x, eps = normal(0, rows, width), np.full(1, 1e-6, np.float32)
    same("Norm", x, normal(1, width), eps)
    same("AddNorm", normal(2, rows, width), x, normal(1, width), eps)
    same("Swiglu", normal(3, rows, 2 * width) * 4)
    ids = np.random.default_rng(0).integers(0, rows, 17).astype(np.int32)
    same("Rows", x, ids)
    same("Rows", narrow(x), ids)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 20), group=st.integers(1, 5), kv=st.integers(1, 4), half=st.integers(1, 40))
def test_heads(tokens: int, group: int, kv: int, half: int) -> None:
    heads, dim = group * kv, 2 * half
    factors = np.repeat(np.array([0.3, 1.0], np.float32), (heads, kv))
    angles = normal(3, tokens, dim), normal(4, tokens, dim)
    qkv, norms = normal(0, tokens, (heads + 2 * kv) * dim), (normal(1, dim), normal(2, dim))
    same("SplitHeads", qkv, *norms, *angles, factors, np.full(1, 1e-6, np.float32))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=6),
    group=st.sampled_from([1, 2, 3, 8, 16]),
    kv=st.sampled_from([1, 2, 5]),
    dim=st.sampled_from([2, 16, 20, 64, 128, 192]),
)
def test_attention(lengths: list[tuple[int, int]], group: int, kv: int, dim: int) -> None:
    """Cached and new tokens of each sequence, its slots anywhere."""
    contexts = np.array([cached + new for cached, new in lengths], np.int32)
    counts = np.array([new for _, new in lengths], np.int32)
    slots = np.random.default_rng(0).permutation(int(contexts.sum()) + 3).astype(np.int32)
    tables = np.full((len(lengths), int(contexts.max())), -1, np.int32)  # what is not read may be anything
    for row, context, end in zip(tables, contexts, np.cumsum(contexts), strict=True):
        row[:context] = slots[end - context : end]
    q = normal(0, int(counts.sum()), group * kv, dim) / np.float32(dim**0.5)
    caches = [normal(i, len(slots), 1, kv, dim) for i in (1, 2)]
    same("Attend", q, *caches, tables, contexts, counts)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 60),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 140),
    ffn=st.integers(1, 300),
    start=st.integers(0, 4),
    half=st.booleans(),
)
def test_experts(tokens: int, top_k: int, hidden: int, ffn: int, start: int, half: bool) -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(8)[:top_k] for _ in range(tokens)]).astype(np.int32)
    stored = [
        normal(1, 4, hidden, 2 * ffn) / np.float32(hidden**0.5),
        normal(2, 4, ffn, hidden) / np.float32(ffn**0.5),
    ]
    stored = [narrow(a) for a in stored] if half else stored
    same("Experts", normal(0, tokens, hidden), normal(3, tokens, top_k), ids, np.array([start], np.int32), *stored)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), depth=st.integers(1, 300), width=sizes)
def test_products_of_int8_bit_for_bit(rows: int, depth: int, width: int) -> None:
    rng = np.random.default_rng([rows, depth, width])
    x, weight = normal(0, rows, depth), rng.integers(-128, 128, (width, depth)).astype(np.int8)
    scales = rng.uniform(1e-3, 1e-2, (width, 1)).astype(np.float32)
    bias = rng.integers(-999, 999, width).astype(np.int32)
    static = [scales[:, 0], bias, np.array([0.0213], np.float32), np.array([-7], np.float32)]
    for name, inputs in (("ProductInt8", [x, weight, scales]), ("ProductInt8Static", [x, weight, *static])):
        (found,), (expected,) = both(name, *inputs)
        assert found.tobytes() == expected.tobytes()


def test_mlp_and_experts_of_int8() -> None:
    """Gates are so large that silu of one is itself, in whatever way it is computed: codes are the same."""
    examples = check.examples(np.random.default_rng(0))
    for name in ("AfterAttentionInt8", "AttentionInt8", "ExpertsInt8", "HeadsInt8", "LayerInt8", "MlpInt8"):
        same(name, *examples[name][0])


def test_layers_and_their_halves() -> None:
    for name, (inputs, _) in check.examples(np.random.default_rng(0)).items():
        if name.startswith(("Attention", "Layer", "Mlp")) and "Int8" not in name:
            same(name.partition(" ")[0], *inputs)


def test_many_tokens_go_through_the_experts_in_parts() -> None:
    ids = np.random.default_rng(0).integers(0, 3, (2500, 2)).astype(np.int32)
    stored = [normal(1, 3, 20, 30), normal(2, 3, 15, 20)]
    same("Experts", normal(0, 2500, 20), normal(3, 2500, 2), ids, np.zeros(1, np.int32), *stored)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("Rows", [normal(0, 4, 8), np.array([4], np.int32)]),
        ("Rows", [normal(0, 4, 8), np.array([-1], np.int32)]),
        ("Rows", [np.zeros((4, 8), np.int32), np.array([0], np.int32)]),
        ("Product", [normal(0, 1, 8), np.zeros((4, 8), np.int32)]),
        ("Attend", [[[1, 5]], [2], [1]]),
        ("Attend", [[[1, -1]], [2], [1]]),
        ("Attend", [[[1, 2]], [3], [1]]),
        ("Attend", [[[1, 2]], [2], [3]]),
        ("Attend", [[[1, 2]], [2], [2]]),
    ],
)
def test_what_is_out_of_range_is_refused_before_memory_is_touched(name: str, inputs: list[Any]) -> None:
    path = library().path
    assert path is not None
    if name == "Attend":  # one query, five slots
        caches = [normal(i, 5, 1, 1, 16) for i in range(2)]
        inputs = [normal(2, 1, 1, 16), *caches, *(np.array(a, np.int32) for a in inputs)]
    with pytest.raises(ArithmeticError, match=rf"{name} returned [124]"):
        call(path, name, inputs, (1, 16))


def test_kernels_that_round_are_not_proved(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was proved before stays so."""
    source = checkpoint("untied")
    convert(source, tmp_path / "artifact")
    compile_graphs(tmp_path / "artifact", "cpu")
    assert prove(tmp_path / "artifact", "cpu", source).ok
    proven = (tmp_path / "artifact/msconv.json").read_bytes()
    monkeypatch.setenv("MSCONV_KERNELS", "avx512bf16")
    with pytest.raises(EnvironmentProblem, match="MSCONV_KERNELS=avx512bf16: these kernels round activ"):
        prove(tmp_path / "artifact", "cpu", source)
    assert (tmp_path / "artifact/msconv.json").read_bytes() == proven
    artifact = Artifact(tmp_path / "artifact")
    told = {target: proof_of(artifact, target)["rounding_kernels"] for target in ("cpu", "ascend910b")}
    assert told == {"cpu": "avx512bf16", "ascend910b": ""}


@pytest.fixture(scope="module")
def sound(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from msconv.steps.compile import compile_graphs

    root = tmp_path_factory.mktemp("compiled") / "sound"
    convert(checkpoint("untied"), root, tp=2)
    compile_graphs(root, "cpu")
    return root


def kernels(edit: GraphEdit, name: str) -> list[Any]:
    """A kernel's nodes, in order."""
    return [
        n
        for n in edit.nodes
        if (p := edit.primitive(n)) is not None
        and any(a.name == "func_name" and a.s.decode() == f"{LIBRARY}:{name}" for a in p.attribute)
    ]


def exchanged(kernel: str, place: int, a: int, b: int) -> Callable[[GraphEdit], None]:
    def change(edit: GraphEdit) -> None:
        node = kernels(edit, kernel)[place]
        node.input[a], node.input[b] = node.input[b], node.input[a]

    return change


def down_proj_of_the_next_layer(edit: GraphEdit) -> None:
    if nodes := kernels(edit, "Mlp"):
        nodes[0].input[2] = nodes[1].input[2]
    else:
        nodes = edit.all("MatMul")
        nodes[3].input[1] = nodes[7].input[1]


def one_cache_for_keys_and_values(edit: GraphEdit) -> None:
    node = kernels(edit, "Attention")[1]
    node.input[10] = node.input[9]


def bypassed(kernel: str, place: int) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.bypass(kernels(edit, kernel)[place])


def renamed(kernel: str, name: str) -> Callable[[GraphEdit], None]:
    def change(edit: GraphEdit) -> None:
        edit.attribute(kernels(edit, kernel)[0], "func_name", name)

    return change


def attribute(name: str, value: int) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.attribute(kernels(edit, "Norm")[0], name, value)


def unsummed(edit: GraphEdit) -> None:
    edit.bypass(edit.all("AllReduce")[1])


def same_factors_for_keys(edit: GraphEdit) -> None:
    """All layers share the constant."""
    node = kernels(edit, "Attention")[1]
    tensor = edit.made(node.input[7]).attribute[0].tensors[0]
    factors = np.frombuffer(tensor.raw_data, np.float32).copy()
    factors[:] = factors[0]
    tensor.raw_data = factors.tobytes()


FAULTS: dict[str, tuple[Callable[[GraphEdit], None], str]] = {
    "cos and sin exchanged": (exchanged("Attention", 0, 5, 6), attention(0)),
    "norms of queries and keys exchanged": (exchanged("Attention", 1, 3, 4), attention(1)),
    "keys scaled like queries": (same_factors_for_keys, attention(0)),
    "one cache for keys and values": (one_cache_for_keys_and_values, attention(1)),
    "another layer's matrix": (down_proj_of_the_next_layer, mlp(0)),
    "a norm left out": (bypassed("Norm", 0), "input_layernorm|self_attn"),
    "a sum over ranks left out": (unsummed, attention(0)),
    "the kernels of another version": (
        renamed("Attention", "msconv-native-0:Attention"),
        "msconv-native-0:Attention",
    ),
    "a kernel of another name": (renamed("Norm", f"{LIBRARY}:Norms"), "not known"),
    "an attribute of no meaning": (attribute("epsilon", 1), "epsilon"),
    "another device": (attribute("cpp_infer_shape", 0), "Norm"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_compiled_graph_is_caught(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, place = FAULTS[name]
    monkeypatch.setattr("msconv.verify.subject.compare", lambda *a, **k: compare(*a, **{**k, "steps": 2}))
    root = Path(shutil.copytree(sound, tmp_path / "own"))
    edit_graphs(root, "cpu", ("mixed_compiled",), change)
    try:
        proof = prove(root, "cpu", None)
    except VerificationFailed as e:
        assert re.search(place, e.message), e.message
        return
    assert not proof.ok
    assert re.search(place + ".* in compiled prefill", proof.comparison.first), proof.comparison.first
    assert all(e < 1e-4 for phase, e in proof.comparison.by_phase.items() if not phase.startswith("compiled"))
    assert read_manifest(root).proof_for("cpu") is None


@pytest.mark.parametrize("name", ["verify", "verify_compiled"])
def test_a_fault_in_the_graph_of_all_logits_is_caught_there(sound: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "own"))
    edit_graphs(root, "cpu", (name,), down_proj_of_the_next_layer)
    proof = prove(root, "cpu", None)
    assert not proof.ok
    phase = "all tokens" if name == "verify" else "compiled all tokens"
    assert proof.comparison.first.endswith(f"in {phase}"), proof.comparison.first
    assert all(e < 1e-4 for other, e in proof.comparison.by_phase.items() if other != phase)


def test_without_a_fault_all_phases_are_proven(sound: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "own"))
    proof = prove(root, "cpu", None)
    assert proof.ok
    phases = ["prefill", "decode", "prefill on a cached prefix", "decode after it", "all tokens"]
    assert list(proof.comparison.by_phase) == [*phases, *(f"compiled {p}" for p in phases)]


def test_the_first_layers_are_proven_where_a_layer_is_one_node(tmp_path: Path) -> None:
    convert(make_qwen3(tmp_path / "model", num_hidden_layers=3), tmp_path / "one")
    compile_graphs(tmp_path / "one", "cpu")
    for layers in (1, 2):
        proof = prove(tmp_path / "one", "cpu", None, layers=layers)
        assert proof.ok and f"model.layers.{layers}.input_layernorm" in proof.comparison.probes
        assert f"model.layers.{layers + 1}.input_layernorm" not in proof.comparison.probes
    edit_graphs(tmp_path / "one", "cpu", ("mixed_compiled",), exchanged("Layer", 1, 5, 6))
    assert prove(tmp_path / "one", "cpu", None, layers=1).ok
    proof = prove(tmp_path / "one", "cpu", None, layers=2)
    place = "model.layers.1, seen at model.layers.2.input_layernorm in compiled prefill"
    assert not proof.ok and proof.comparison.first == place


def test_the_graph_takes_matrices_as_they_are_stored(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from msconv.steps.compile import compile_graphs

    stored = {"bfloat16_shards": "bfloat16", "float16": "float32", "untied": "float32"}
    for name, dtype in stored.items():
        convert(checkpoint(name), tmp_path / name, tp=1)
        graphs = [m.graph for m in compile_graphs(tmp_path / name, "cpu") if m.graph.variant == "compiled"]
        assert graphs
        for compiled in graphs:
            types = {p.name: p.dtype for p in compiled.reads}
            assert types[name_of(0, "mlp.down_proj.weight")] == dtype
            assert types[name_of(0, "input_layernorm.weight")] == "float32"

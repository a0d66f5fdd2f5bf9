"""Graphs in which an MLP's activation is one `Swiglu`: compiled when asked for, proved, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from msconv.cli import compile as compiling
from msconv.cli import inspect
from msconv.steps.compile import compile_graphs
from msconv.verify import subject as proving
from msconv.verify.compare import compare
from msconv.verify.prove import prove
from msconv_runtime.artifact import Artifact, Graph, read_manifest
from msconv_runtime.errors import UsageError, VerificationFailed
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.every import one_of_many
from tests.moe_checkpoints import add_mtp, make_deepseek_v3, make_qwen3_moe, quantise_fp8
from tests.verify.planting import GraphEdit, Ranks, edit_graphs, edit_weights

pytestmark = pytest.mark.slow

every_layout = one_of_many("test-fused")
TARGET, FUSED = "ascend910b", ("swiglu",)
ROLES = ("prefill", "decode", "verify")
HALF = 48  # rows of gate on each of two ranks
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 203,  # odd: the last rank is padded
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"moe_intermediate_size": 32}


def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_num_threads(1)  # tiny matrices only wait for more
    monkeypatch.setattr(proving, "compare", lambda *a, **k: compare(*a, **{**k, "steps": 2}))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    few_steps(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("model") / "small", **HEADS, **SMALL)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for two ranks with the graphs that are made without the flag.  To be read, never changed."""
    root = tmp_path_factory.mktemp("plain") / "artifact"
    convert(model, root, 2)
    compile_graphs(root, TARGET)
    return root


@pytest.fixture(scope="module")
def by_command(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The same artifact with an operation fused, and what the command said."""
    root = Path(shutil.copytree(plain, tmp_path_factory.mktemp("fused") / "artifact"))
    done = CliRunner().invoke(compiling.command, [str(root), "--target", TARGET, "--fuse", "swiglu", "--json"])
    assert done.exit_code == 0, done.exception
    return root, done


@pytest.fixture(scope="module")
def fused(by_command: tuple[Path, Result]) -> Path:
    """To be read, never changed."""
    return by_command[0]


@pytest.fixture
def own(fused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fused, tmp_path / "own"))


def kinds_are_fused(graphs: list[Graph], activations: int) -> None:
    for graph in graphs:
        assert graph.fused == [*FUSED]
        assert graph.kinds["Swiglu"] == activations, graph.name
        assert not {"SiLU", "Split"} & set(graph.kinds), graph.name


def test_a_fused_graph_is_proven_with_two_nodes_less_a_layer(plain: Path, own: Path) -> None:
    graphs = Artifact(own).graphs(TARGET)
    assert [g.name for g in graphs] == sorted(ROLES)
    kinds_are_fused(graphs, SMALL["num_hidden_layers"])
    for graph, before in zip(graphs, Artifact(plain).graphs(TARGET), strict=True):
        launched = [
            sum(n for kind, n in g.kinds.items() if kind in ("Split", "SiLU", "Mul", "Swiglu"))
            for g in (graph, before)
        ]
        assert launched[1] - launched[0] == 2 * SMALL["num_hidden_layers"]
        assert (graph.inputs, graph.outputs) == (before.inputs, before.outputs)
        assert sorted(p.name for p in graph.reads) == sorted(p.name for p in before.reads)
        assert before.fused == []
    proof = prove(own, TARGET, None)
    assert proof.ok, proof.comparison
    assert proof.comparison.max_abs_logit_error < 1e-4
    assert read_manifest(own).proof_for(TARGET) is not None


def test_what_is_fused_is_said_and_shown(by_command: tuple[Path, Result]) -> None:
    root, done = by_command
    assert [g["fused"] for g in json.loads(done.stdout)["graphs"]] == [["swiglu"]] * len(ROLES)
    assert done.stderr.count("swiglu fused") == len(ROLES)
    assert CliRunner().invoke(inspect.command, [str(root)]).stdout.count("swiglu fused") == len(ROLES)
    page = (root / "report.html").read_text()
    assert page.count("swiglu</span> fused</th>") > len(ROLES)
    assert f"--target {TARGET} --fuse swiglu" in page


def test_compiled_without_the_flag_the_artifact_is_as_it_was(plain: Path, own: Path) -> None:
    compile_graphs(own, TARGET)
    assert read_manifest(own) == read_manifest(plain)
    for graph in Artifact(plain).graphs(TARGET):
        assert (own / graph.path).read_bytes() == (plain / graph.path).read_bytes()
    assert b"fused" not in (own / "msconv.json").read_bytes()


def halves_exchanged(edit: GraphEdit) -> None:
    """As a kernel does that takes silu of the second half."""
    act = edit.all("Swiglu")[0]
    halves = edit.add(act, "Split", [act.input[0], edit.constant(act, -1), edit.constant(act, 2)])
    up, gate = (edit.add(act, "TupleGetItem", [halves, edit.constant(act, i)]) for i in (1, 0))
    act.input[0] = edit.add(act, "Concat", [edit.add(act, "MakeTuple", [up, gate]), edit.constant(act, -1)])


def rows_halved(edit: GraphEdit) -> None:
    edit.set(edit.all("Swiglu")[0], 1, 0)


def matrices_exchanged(ranks: Ranks) -> None:
    """gate and up, in the first layer."""
    for values in ranks:
        both = values["model.layers.0.mlp.gate_up_proj.weight"]
        both[:HALF], both[HALF:] = both[HALF:].copy(), both[:HALF].copy()


@pytest.fixture
def _graphs_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed list of what a graph may hold would refuse those in which a fault is planted."""
    for module in ("mindir_check", "artifact.integrity"):
        monkeypatch.setattr(f"msconv_runtime.{module}.refusal", lambda *args: "")


@pytest.mark.usefixtures("_graphs_are_taken")
def test_exchanged_halves_are_caught_and_their_place_named(own: Path) -> None:
    edit_graphs(own, TARGET, ROLES, halves_exchanged)
    proof = prove(own, TARGET, None)
    assert not proof.ok
    assert "model.layers.0.mlp" in proof.comparison.first
    assert read_manifest(own).proof_for(TARGET) is None


def test_exchanged_weights_are_caught_and_their_place_named(own: Path) -> None:
    edit_weights(own, matrices_exchanged)
    proof = prove(own, TARGET, None)
    assert not proof.ok
    assert "model.layers.0.mlp" in proof.comparison.first


@pytest.mark.usefixtures("_graphs_are_taken")
def test_halves_of_another_dimension_cannot_be_run(own: Path) -> None:
    edit_graphs(own, TARGET, ROLES, rows_halved)
    with pytest.raises(VerificationFailed, match=r"Swiglu.*dim 0"):
        prove(own, TARGET, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "ascend310p"), "ascend310p: its graphs cannot have swiglu fused."),
        (("--target", TARGET, "--target", "cpu"), "cpu: its graphs cannot have swiglu fused."),
        (("--target", "onnx"), "onnx: its graphs cannot have swiglu fused."),
        ((), "--fuse goes with --target ascend910b or ascend910c."),
        (("--target", TARGET, "--fuse", "AddRmsNorm"), "'AddRmsNorm' is not 'swiglu'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_fused_is_refused_before_anything_is_made(
    model: Path, fused: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    for place in ((fused,), ("--model", model, "--tp", 2, "--output", tmp_path / "new")):
        done = CliRunner().invoke(compiling.command, [*map(str, place), *words, "--fuse", "swiglu"])
        assert isinstance(done.exception, UsageError | SystemExit)
        assert message in getattr(done.exception, "message", done.output)
    assert not (tmp_path / "new").exists()


@dataclass(frozen=True)
class Case:
    """A model, how it is cut and converted, and how many of its activations are fused in a graph of the model."""

    make: Callable[..., Path]
    tp: int
    ep: int
    activations: int
    values: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "qwen3, int8": Case(
        make_qwen3,
        2,
        1,
        2,
        HEADS,
        {"quant": "w8a8"},
    ),
    "qwen3-moe": Case(make_qwen3_moe, 2, 1, 2, EXPERTS),
    "qwen3-moe, ep": Case(make_qwen3_moe, 4, 2, 2, EXPERTS),
    "qwen3-moe, ep, int8": Case(make_qwen3_moe, 4, 2, 2, EXPERTS, {"quant": "w8a8"}),
    "deepseek, ep": Case(make_deepseek_v3, 4, 2, 3, EXPERTS),
    "deepseek, ep, int8": Case(make_deepseek_v3, 4, 2, 3, EXPERTS, {"quant": "w8a8", "dtype": "bfloat16"}),
    "deepseek, fp8, a draft": Case(make_deepseek_v3, 2, 2, 3, EXPERTS, {}),
}


@every_layout
@pytest.mark.parametrize("name", CASES)
def test_every_family_is_proven_with_it(tmp_path: Path, name: str) -> None:
    case, root = CASES[name], tmp_path / "artifact"
    model = case.make(tmp_path / "model", **{**SMALL, **case.values})
    if "draft" in name:
        model = quantise_fp8(add_mtp(model), tmp_path / "fp8", (32, 32))
    convert(model, root, case.tp, ep=case.ep, **case.options)
    compile_graphs(root, TARGET, fused=FUSED)
    graphs = Artifact(root).manifest.graphs_for(TARGET)
    kinds_are_fused([g for g in graphs if g.role in ROLES], case.activations)
    assert all(g.fused == [*FUSED] and "Swiglu" in g.kinds for g in graphs)
    assert len(graphs) == len(ROLES) + 2 * ("draft" in name)
    proof = prove(root, TARGET, model)
    assert proof.ok, proof.place
    assert read_manifest(root).proof_for(TARGET) is not None


@every_layout
def test_the_graphs_of_910c_are_those_of_910b(own: Path) -> None:
    compile_graphs(own, "ascend910c", fused=FUSED)
    first, second = (Artifact(own).graphs(target) for target in (TARGET, "ascend910c"))
    assert [g.digest for g in first] == [g.digest for g in second]

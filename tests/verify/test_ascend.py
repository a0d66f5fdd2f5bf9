"""Graphs for Ascend, made and proven on a machine that has none: each target, whatever the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msconv.families import configure
from msconv.graph.export import export
from msconv.graph.spec import Local
from msconv.layout.cuts import Mesh
from msconv.steps.compile import compile_graphs
from msconv.steps.conversion import run
from msconv.verify.prove import prove
from msconv.verify.result import Proof
from msconv_runtime.artifact import read_manifest
from msconv_runtime.roles import DECODE
from msconv_runtime.targets import target_named
from tests.checkpoints import make_qwen3
from tests.commands import run_msconv, run_python
from tests.conftest import Checkpoints
from tests.conversions import prepare
from tests.synthetic import qwen3_config
from tests.warm import run_warm

pytestmark = pytest.mark.slow

TARGETS = ("ascend910b", "ascend910c", "ascend310p", "cpu")
# Every number of ranks, target and variant, and every pair where the two meet in code: 2 KV heads are shared
# at tp 4 and 8, 1003 vocabulary rows are padded above tp 1, and head_dim is nowhere hidden/heads but in
# "square".  One rank on cpu is test_verify.py's.
PROOFS = [
    ("tied", 8, ("ascend910b", "cpu")),
    ("attention_bias", 8, ("ascend310p",)),
    ("yarn", 2, ("ascend310p",)),
    ("sixteen_heads", 2, ("ascend910c",)),
    ("attention_bias", 2, ("cpu",)),
    ("square", 1, ("ascend910b",)),
]
SQUARE = {"head_dim": 16, "vocab_size": 1024, "num_key_value_heads": 8}


def mind_ir(data: bytes) -> Any:
    from mindspore.train import mind_ir_pb2

    return mind_ir_pb2.ModelProto.FromString(data)


def attributes(model: Any, kind: str) -> list[dict[str, Any]]:
    """Of every primitive of a kind: integers and strings."""
    return [{a.name: a.s.decode() or a.i for a in p.attribute} for p in model.primitives if p.op_type == kind]


@pytest.fixture(scope="module")
def by_command(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`untied` at tp 4 with graphs for all targets, made by the commands.  To be read, and proven."""
    root = tmp_path_factory.mktemp("ascend") / "untied-tp4"
    done = run_warm("convert", "--model", checkpoint("untied"), "--tp", 4, "--output", root)
    assert done.code == 0, done.stderr
    done = run_warm("compile", root, *(word for t in TARGETS for word in ("--target", t)))
    assert done.code == 0, done.stderr
    return root


def proven(root: Path, target: str) -> Proof:
    import torch

    torch.set_num_threads(1)
    proof = prove(root, target, None)
    assert proof.comparison.max_abs_logit_error < 1e-4, proof.comparison
    assert proof.comparison.argmax_agreement == 1.0
    assert proof.comparison.rows > 100
    assert proof.ok, proof
    assert read_manifest(root).proof_for(target) is not None
    return proof


@pytest.mark.parametrize("target", ["ascend910c", "ascend310p", "cpu"])
def test_one_compilation_serves_every_target(by_command: Path, target: str) -> None:
    assert proven(by_command, target).ranks == 4


def test_verify_exits_0_and_its_proof_is_kept(by_command: Path) -> None:
    done = run_warm("verify", by_command, "--target", "ascend910b", "--json")
    assert done.code == 0, done.stderr
    assert done.json["max_abs_logit_error"] < 1e-4
    assert done.json["argmax_agreement"] == 1.0
    assert done.json["ranks"] == 4
    assert done.json["coverage"] == {"missing": [], "unused": []}
    assert read_manifest(by_command).proof_for("ascend910b") is not None


@pytest.mark.parametrize(("variant", "tp", "targets"), PROOFS, ids=lambda value: str(value))
def test_every_variant_is_proven_on_all_ranks(
    checkpoint: Checkpoints, tmp_path: Path, variant: str, tp: int, targets: tuple[str, ...]
) -> None:
    model = make_qwen3(tmp_path / "model", **SQUARE) if variant == "square" else checkpoint(variant)
    run(prepare(model, tp, output=tmp_path / "out"))
    for target in targets:
        compile_graphs(tmp_path / "out", target)
        assert proven(tmp_path / "out", target).ranks == tp


def test_one_file_a_role_serves_every_rank_and_knows_none(by_command: Path) -> None:
    manifest = read_manifest(by_command)
    for target in TARGETS:
        files = sorted((by_command / "graphs" / target).iterdir())
        assert [f.stem for f in files] == sorted(g.name for g in manifest.graphs_for(target))
        compiled = {"mixed_compiled", "verify_compiled"} if target == "cpu" else set()
        names = {"prefill", "decode", "verify"} | compiled
        assert {f.stem for f in files} == names
        for file in files:
            assert b"rank_id" not in file.read_bytes()


def test_collectives_name_their_group_and_size(by_command: Path) -> None:
    for graph in read_manifest(by_command).graphs:
        model = mind_ir((by_command / graph.path).read_bytes())
        gathers, reductions = attributes(model, "AllGather"), attributes(model, "AllReduce")
        assert graph.groups == ["msconv_tp"]
        assert {a["group"] for a in gathers + reductions} == {"msconv_tp"}
        assert {a["op"] for a in reductions} == {"sum"}
        assert [a["rank_size"] for a in gathers] == ([] if graph.target == "cpu" else [4])


def test_graphs_hold_no_byte_of_a_weight(by_command: Path) -> None:
    manifest = read_manifest(by_command)
    assert manifest.weights is not None
    stored = {t.name: t.shape for t in manifest.weights.tensors}
    for graph in manifest.graphs:
        model = mind_ir((by_command / graph.path).read_bytes())
        shapes = {p.name.rpartition(":")[2]: list(p.dims) for p in model.graph.parameter}
        assert shapes.items() <= stored.items()
        assert [p.name for p in model.graph.parameter if p.raw_data] == []
        largest = max(len(t.raw_data) for n in model.graph.node for a in n.attribute for t in a.tensors)
        assert largest <= 32 * 4  # a frequency for each dimension of a head


def test_targets_differ_in_their_types_alone(by_command: Path) -> None:
    def read(target: str) -> list[bytes]:
        return [f.read_bytes() for f in sorted((by_command / "graphs" / target).iterdir())]

    assert read("ascend910b") == read("ascend910c")
    for target, data_type in (("ascend910b", 16), ("ascend310p", 10), ("cpu", 1)):
        for data in read(target):
            found = {p.data_type for p in mind_ir(data).graph.parameter if not p.name.endswith("vocab_start")}
            assert found == {data_type}


def config_directory(directory: Path, **changes: Any) -> Path:
    """A model of which nothing is known but its config.json."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(qwen3_config(**changes)))
    return directory


def local(config: dict[str, Any], tp: int, target: str) -> Local:
    """A rank's decode graph."""
    return Local(configure(config, "config.json")[1], Mesh(tp), target_named(target), DECODE)


@pytest.mark.parametrize("target", ["ascend910b", "ascend310p"])
def test_a_graph_is_as_large_for_a_wide_model_as_for_a_narrow_one(target: str) -> None:
    sizes = []
    for factor in (1, 64):
        config = qwen3_config(hidden_size=64 * factor, intermediate_size=128 * factor, vocab_size=1000 * factor)
        exported = export(local(config, 2, target))
        assert not any(p.raw_data for p in mind_ir(exported.proto).graph.parameter)
        sizes.append(len(exported.proto))
    assert sizes[1] - sizes[0] < 200  # larger numbers take more digits


@pytest.mark.parametrize("tp", [1, 2, 8, 16])
def test_a_gather_has_the_size_of_the_group(tp: int) -> None:
    config = qwen3_config(num_attention_heads=16, num_key_value_heads=4, intermediate_size=64)
    exported = export(local(config, tp, "ascend910b"))
    gathers = attributes(mind_ir(exported.proto), "AllGather")
    assert [a["rank_size"] for a in gathers] == ([tp] if tp > 1 else [])
    assert exported.groups == (["msconv_tp"] if tp > 1 else [])


def test_two_processes_of_different_ranks_compile_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config_directory(
        tmp_path / "model", num_hidden_layers=2, num_attention_heads=8, head_dim=8, vocab_size=1003
    )
    trees: list[dict[str, bytes]] = []
    for rank, seed in (("0", "1"), ("3", "2")):
        for name, value in {"RANK_ID": rank, "RANK_SIZE": "4", "DEVICE_ID": rank, "PYTHONHASHSEED": seed}.items():
            monkeypatch.setenv(name, value)
        root = tmp_path / f"rank-{rank}"
        targets = ("--target", "ascend910b", "--target", "ascend310p")
        done = run_msconv("compile", "--model", model, "--tp", 4, *targets, "--output", root)
        assert done.code == 0, done.stderr
        trees.append({str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*.mindir")})
    assert len(trees[0]) == 6
    assert {name for name in trees[0] | trees[1] if trees[0].get(name) != trees[1].get(name)} == set()


WIDE = """
import os, sys
from pathlib import Path
from msconv.families import configure
from msconv.graph.export import export
from msconv.graph.spec import Local
from msconv.layout.cuts import Mesh
from msconv_runtime.roles import PREFILL
from msconv_runtime.targets.ascend import ASCEND910B
import json
config = configure(json.loads(sys.argv[1]), "config.json")[1]
def peak():  # getrusage would begin with that of who started us
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
before = peak()
exported = export(Local(config, Mesh(8), ASCEND910B, PREFILL))
after = peak()
from mindspore.communication import GlobalComm
links = []
for name in os.listdir("/proc/self/fd"):
    try:
        links.append(os.readlink("/proc/self/fd/" + name))
    except OSError:
        pass
print(json.dumps({
    "grown": (after - before) * 1024,
    "peak": after * 1024,
    "size": len(exported.proto),
    "communicating": bool(GlobalComm.INITED),
    "sockets": [link for link in links if link.startswith("socket:")],
}))
"""


def test_compiling_takes_no_memory_for_weights_and_starts_no_communication() -> None:
    """Two layers as wide as 32B's for 8 ranks: 0.6 GB of weights a rank."""
    config = qwen3_config(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=2,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    done = run_python(WIDE, json.dumps(config))
    assert done.code == 0, done.stderr
    found = done.json
    assert found["grown"] < 400 << 20  # MindSpore itself is loaded in between
    assert found["peak"] < 1536 << 20
    assert found["size"] < 256 << 10
    assert not found["communicating"]
    assert found["sockets"] == []


def test_a_proof_does_not_outlive_its_graphs_or_reach_another_target(
    by_command: Path, tmp_path: Path, own_copy: Callable[[Path], Path]
) -> None:
    root = own_copy(by_command)
    proven(root, "ascend910b")
    whole = {t: read_manifest(root).proof_for(t) is not None for t in TARGETS}
    file = root / "graphs" / "ascend910b" / "decode.mindir"
    compile_graphs(root, "ascend310p")  # the same bytes again: nothing is lost
    assert {t: read_manifest(root).proof_for(t) is not None for t in TARGETS} == whole
    file.write_bytes(file.read_bytes() + b"\0")
    done = run_warm("verify", root, "--target", "ascend910b")
    assert done.code == 3
    assert "graphs/ascend910b/decode.mindir" in done.stderr
    assert read_manifest(root).proof_for("ascend910b") is None


@pytest.fixture
def own_copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy that the test may change."""
    import shutil

    return lambda root: Path(shutil.copytree(root, tmp_path / "own"))

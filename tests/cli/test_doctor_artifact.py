"""`msconv doctor ARTIFACT`: whether this machine can serve it, and what is wrong if not."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv_runtime import claims
from msconv_runtime.artifact import (
    FORMAT,
    GraphInput,
    Manifest,
    Verified,
    digest_of,
    read_manifest,
    write_manifest,
)
from tests.cli.machines import cannot, examine, finding, machine, with_npu, write
from tests.commands import run_msconv, run_python


def change(root: Path, **changes: Any) -> Manifest:
    """Rewrite an artifact's manifest as if it had been made so."""
    manifest = msgspec.structs.replace(read_manifest(root), **changes)
    write_manifest(root, manifest)
    return manifest


def of_mindspore(root: Path, version: str) -> None:
    graphs = [msgspec.structs.replace(g, mindspore=version) for g in read_manifest(root).graphs]
    change(root, graphs=graphs)


def test_an_artifact_is_told_in_short(compiled: Path) -> None:
    done = run_msconv("doctor", compiled, "--json")
    assert done.code == 0
    rank = sum(p.stat().st_size for p in (compiled / "weights").iterdir())
    short = {"format": FORMAT, "tp": 1, "ep": 1, "rank_bytes": rank, "proven": {"cpu": False}}
    assert done.json["artifact"] == {"path": str(compiled), "ready": True, **short}
    states = {f["name"]: f["state"] for f in done.json["findings"]}
    assert states["graphs cpu"] == "ok"
    assert states["proof cpu"] == "untested"
    assert states["memory to serve"] == "ok"
    assert states["graphs ascend910b"] == "missing"


def test_a_proof_is_seen_and_next_is_serve(own_artifact: Path) -> None:
    manifest = read_manifest(own_artifact)
    assert manifest.weights is not None
    proof = Verified(
        target="cpu",
        weights_digest=manifest.weights.digest,
        graph_digests=[g.digest for g in manifest.graphs],
        reference="r",
        mode="m",
        bound=1e-4,
        max_abs_logit_error=2e-6,
        argmax_agreement=1.0,
        ranks=1,
        logits_compared=1,
    )
    change(own_artifact, verified=[proof])
    done = run_msconv("doctor", own_artifact)
    assert "largest logit error 2.00e-06 (claimed by its author, not checked here)" in done.stdout
    assert done.stderr.splitlines()[-1] == f"Next: msconv verify {own_artifact}"
    claims.note(manifest, proof)
    done = run_msconv("doctor", own_artifact)
    assert "largest logit error 2.00e-06;" in done.stdout or "largest logit error 2.00e-06\n" in done.stdout
    assert done.stderr.splitlines()[-1] == f"Next: msconv serve {own_artifact}"
    (own_artifact / "graphs/cpu/decode.mindir").write_bytes(b"x")
    done = run_msconv("doctor", own_artifact, "--json")
    assert (done.code, done.json["artifact"]["proven"]) == (4, {"cpu": False})


def damage_ready(root: Path) -> None:
    (root / "READY").unlink()


def damage_ready_kind(root: Path) -> None:
    (root / "READY").unlink()
    (root / "READY").mkdir()


def damage_format(root: Path) -> None:
    path = root / "msconv.json"
    path.write_text(re.sub('"format": [0-9]+', '"format": 99', path.read_text()))


def damage_manifest(root: Path) -> None:
    (root / "msconv.json").write_bytes(b"{")


def damage_graph(root: Path) -> None:
    path = root / "graphs/cpu/prefill.mindir"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def damage_weights(root: Path) -> None:
    os.truncate(next((root / "weights").iterdir()), 1000)


def damage_graphs(root: Path) -> None:
    change(root, graphs=read_manifest(root).graphs[:1])


@pytest.mark.parametrize(
    ("harm", "name", "state", "words"),
    [
        (damage_ready, "artifact", "wrong", "READY is missing"),
        (damage_ready_kind, "artifact", "wrong", "READY"),
        (damage_format, "artifact", "wrong", "format 99"),
        (damage_manifest, "artifact", "wrong", "not a valid manifest"),
        (damage_graph, "file", "wrong", "graphs/cpu/prefill.mindir: digest differs"),
        (damage_weights, "file", "wrong", "has 1000 bytes"),
        (damage_graphs, "graphs cpu", "missing", "decode of mindspore"),
        (lambda root: change(root, graphs=[]), "graphs cpu", "missing", "none"),
        (lambda root: change(root, weights=None), "weights", "missing", "none"),
        (lambda root: of_mindspore(root, "2.5.0"), "graphs cpu", "wrong", "2.5.0"),
    ],
)
def test_an_artifact_that_cannot_be_served_exits_4(
    own_artifact: Path, harm: Any, name: str, state: str, words: str
) -> None:
    harm(own_artifact)
    done = run_msconv("doctor", own_artifact, "--json")
    assert done.code == 4, done.stderr
    (found,) = [f for f in done.json["findings"] if f["name"] == name]
    assert found["state"] == state
    assert words in found["found"]
    assert found["hint"]
    assert done.json["can"]["convert"]
    assert not done.json["can"]["serve_cpu"]
    assert done.json["artifact"]["path"] == str(own_artifact)


@pytest.mark.parametrize(("here", "state"), [("2.8.0", "ok"), ("2.9.0", "untested"), (None, "untested")])
def test_graphs_are_held_against_the_installed_mindspore(
    compiled: Path, tmp_path: Path, here: str | None, state: str
) -> None:
    report = examine(machine(tmp_path, {"mindspore": here}), compiled)
    assert finding(report, "graphs cpu").state == state
    assert f"{here or 'none'} is installed" in finding(report, "graphs cpu").found
    assert report.can["serve_cpu"] is (here is not None)


def test_an_artifact_larger_than_free_memory_cannot_be_served(compiled: Path, tmp_path: Path) -> None:
    usual = float(finding(examine(machine(tmp_path), compiled), "memory to serve").needed.split()[0])
    for free, state in ((1.1 * usual, "ok"), (0.9 * usual, "untested"), (0.001, "wrong")):
        write(tmp_path / "proc/meminfo", f"MemAvailable: {int(free * (1 << 20))} kB\n")
        report = examine(machine(tmp_path), compiled)
        assert finding(report, "memory to serve").state == state, free
        assert report.can["serve_cpu"] is (state != "wrong")
    write(tmp_path / "proc/meminfo", "MemAvailable: 1000000 kB\n")
    larger = finding(examine(machine(tmp_path), compiled, 10**9), "memory to serve")
    assert (larger.state, "smaller --max-total-tokens" in larger.hint) == ("wrong", True)
    write(tmp_path / "proc/meminfo", "")
    assert finding(examine(machine(tmp_path), compiled), "memory to serve").state == "untested"


def test_ranks_are_held_against_cores_and_devices(own_artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(own_artifact)
    assert manifest.weights is not None
    files = [msgspec.structs.replace(f, rank=r, path=f.path.replace("rank-0", f"rank-{r}"))
             for r in range(4) for f in manifest.weights.files]  # fmt: skip
    for file in files[1:]:
        shutil.copy(own_artifact / manifest.weights.files[0].path, own_artifact / file.path)
    tensors = [msgspec.structs.replace(t, digests=t.digests * 4) for t in manifest.weights.tensors]
    digest = digest_of(f.digest for f in files)
    weights = msgspec.structs.replace(manifest.weights, files=files, tensors=tensors, digest=digest)
    parallel = msgspec.structs.replace(manifest.parallel, tp=4, ep=2)
    alone = finding(examine(machine(tmp_path), own_artifact), "memory to serve").needed
    change(own_artifact, weights=weights, parallel=parallel)
    report = examine(with_npu(tmp_path), own_artifact)
    assert (finding(report, "ranks on cores").state, finding(report, "ranks on cores").found) == (
        "untested",
        "4 on 2",
    )
    assert (finding(report, "ranks on devices").state, report.can["serve_npu"]) == ("wrong", False)
    assert report.can["serve_cpu"]
    assert float(finding(report, "memory to serve").needed.split()[0]) > 3.5 * float(alone.split()[0])
    fits = examine(with_npu(tmp_path, 4, cores=4), own_artifact)
    assert not {f.name for f in fits.findings} & {"ranks on cores", "ranks on devices"}


def add_ascend(root: Path) -> None:
    from msconv.steps.compile import compile_graphs

    compile_graphs(root, "ascend910b")


def test_an_artifact_for_an_npu_can_be_served_there(own_artifact: Path, tmp_path: Path) -> None:
    add_ascend(own_artifact)
    report = examine(with_npu(tmp_path), own_artifact)
    assert cannot(report) == set()
    assert "has run on no device" in finding(report, "proof ascend910b").found
    change(own_artifact, graphs=[g for g in read_manifest(own_artifact).graphs if g.target != "cpu"])
    report = examine(with_npu(tmp_path), own_artifact)
    assert cannot(report) == {"serve_cpu"}
    assert not report.blockers


def test_damage_of_one_target_leaves_the_other(own_artifact: Path, tmp_path: Path) -> None:
    add_ascend(own_artifact)
    npu = [g for g in read_manifest(own_artifact).graphs if g.target == "ascend910b"]
    for graph in npu:
        (own_artifact / graph.path).unlink()
    report = examine(machine(tmp_path), own_artifact)
    assert {f.found.split(":")[0] for f in report.findings if f.name == "file"} == {g.path for g in npu}
    assert report.can["serve_cpu"]


def test_a_cache_without_width_is_counted(own_artifact: Path, tmp_path: Path) -> None:
    graphs = read_manifest(own_artifact).graphs
    caches = [GraphInput("k_cache.0", "float32", [None, None, None, 64], "cache")]
    change(own_artifact, graphs=[msgspec.structs.replace(g, inputs=caches) for g in graphs])
    assert finding(examine(machine(tmp_path), own_artifact), "memory to serve").state == "ok"


def test_a_graph_that_may_not_be_read_is_a_finding(own_artifact: Path, tmp_path: Path) -> None:
    path = own_artifact / "graphs/cpu/decode.mindir"
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read all: a directory that has the size will do
        path.unlink()
        path.mkdir()
        size = path.stat().st_size
        change(
            own_artifact,
            graphs=[msgspec.structs.replace(g, size=size) for g in read_manifest(own_artifact).graphs[:1]],
        )
    report = examine(machine(tmp_path), own_artifact)
    assert "decode.mindir" in finding(report, "file").found
    assert finding(report, "file").state == "wrong"
    assert not report.can["serve_cpu"]


@pytest.mark.parametrize("name", ["numpy", "mindspore", "torch", "sglang", "ml_dtypes", "filelock"])
def test_it_runs_where_a_package_cannot_be_imported(compiled: Path, name: str) -> None:
    code = (
        "import sys, importlib.metadata as m; name = sys.argv[1]; sys.modules[name] = None\n"
        "real = m.version\n"
        "def version(n):\n    if n == name: raise m.PackageNotFoundError(n)\n    return real(n)\n"
        "m.version = version; sys.argv = ['msconv', 'doctor', sys.argv[2], '--json']\n"
        "from msconv.cli import main\nmain()"
    )
    done = run_python(code, name, compiled)
    assert "Traceback" not in done.stderr
    assert done.code == 4, done.stderr
    states = {f["name"]: f["state"] for f in done.json["findings"]}
    assert states[name] == "missing"
    assert states["artifact"] == "ok"

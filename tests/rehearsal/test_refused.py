"""What a rehearsal refuses before it starts anything, what it asks, and who must not take it for a device."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from pathlib import Path

import msgspec
import pytest

from msconv.rehearsal import plan, server
from msconv.rehearsal.build import build_device
from msconv.rehearsal.plan import Options, make_plan
from msconv.rehearsal.protocol import Device
from msconv.rehearsal.scenario import NEW_TOKENS, Conversation, make_scenario, run_scenario
from msconv.standing import standings
from msconv_runtime.artifact import Rehearsed, read_manifest, write_manifest
from msconv_runtime.errors import ArtifactError, EnvironmentProblem, ResourceError, UsageError
from tests.commands import run_command, run_msconv, run_python
from tests.conftest import Checkpoints
from tests.warm import run_warm


@pytest.fixture(scope="module")
def ascend(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with graphs for a CPU and for a 910B.  To be read."""
    root = tmp_path_factory.mktemp("ascend") / "artifact"
    shutil.copytree(compiled, root)
    assert run_warm("compile", root, "--target", "ascend910b").code == 0
    return root


@pytest.fixture
def own_ascend(ascend: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ascend, tmp_path / "own"))


def test_a_plan_has_the_command_that_serve_prints(ascend: Path) -> None:
    found = make_plan(ascend, Options(port=31234))
    extra = found.launches[0].argv[found.launches[0].argv.index("--max-total-tokens") :]
    printed = run_msconv("serve", ascend, "--device", "npu", "--port", 31234, "--print-command", "--", *extra)
    assert printed.stdout.strip() == found.launches[0].shell()
    started, said = found.started[0].argv, found.launches[0].argv
    assert [(a, b) for a, b in zip(said, started, strict=True) if a != b] == [("bfloat16", "float32")]


def test_an_artifact_with_nothing_for_an_npu_is_refused(compiled: Path) -> None:
    with pytest.raises(ArtifactError, match="no graphs for an NPU") as e:
        make_plan(compiled, Options())
    assert "msconv compile" in e.value.hint
    with pytest.raises(UsageError, match="--target cpu"):
        make_plan(compiled, Options(target="cpu"))


def test_damage_is_found_first(own_ascend: Path) -> None:
    path = next((own_ascend / "weights").iterdir())
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=path.name):
        make_plan(own_ascend, Options())


def test_a_port_in_use_is_told(ascend: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        done = run_msconv("rehearse", ascend, "--port", port)
    assert done.code == 4
    assert f"port {port}" in done.stderr


def test_no_compiler_is_told(ascend: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EnvironmentProblem, match=r"no C\+\+ compiler"):
        build_device()


def test_no_sglang_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(server.importlib.metadata, "version", missing)
    with pytest.raises(EnvironmentProblem, match="SGLang is not installed"):
        server.sglang_version()


def test_a_model_that_takes_long_says_how_long_and_offers_fewer_prompts(
    ascend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SECONDS_A_VALUE", {True: 1e-4, False: 1e-4})
    with pytest.raises(ResourceError, match=r"about \d+ minutes: 15 prompts") as e:
        make_plan(ascend, Options())
    assert "--prompts 1" in e.value.hint
    assert make_plan(ascend, Options(prompts=1)).scenario.num_prompts == 1


def test_a_model_that_does_not_fit_is_told(ascend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Machine, "memory", lambda self: 1 << 10)
    with pytest.raises(ResourceError, match="GiB of memory"):
        make_plan(ascend, Options())


def test_flags_that_the_graphs_cannot_obey_are_refused(ascend: Path) -> None:
    with pytest.raises(UsageError, match="--page-size 24"):
        make_plan(ascend, Options(extra=("--page-size", "24")))


@pytest.mark.parametrize(
    "flag",
    [
        "--port=30001",
        "--host=0.0.0.0",
        "--nnodes=2",
        "--model-path=x",
        "--dtype=bfloat16",
        "--kv-cache-dtype=bf16",
    ],
)
def test_flags_that_a_rehearsal_decides_are_refused(ascend: Path, flag: str) -> None:
    with pytest.raises(UsageError, match=flag.partition("=")[0]):
        make_plan(ascend, Options(extra=(flag,)))


def test_a_directory_to_keep_must_be_empty(ascend: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_msconv("rehearse", ascend, "--keep", tmp_path)
    assert done.code == 2
    assert "is not empty" in done.stderr


def test_serving_on_a_cpu_says_what_there_is(own_ascend: Path) -> None:
    manifest = read_manifest(own_ascend)
    only = [g for g in manifest.graphs if g.target != "cpu"]
    write_manifest(own_ascend, msgspec.structs.replace(manifest, graphs=only))
    done = run_msconv("serve", own_ascend)
    assert done.code == 1
    assert "has graphs for ascend910b, none for a CPU" in done.stderr
    assert "--device npu" in done.stderr
    assert "msconv rehearse" in done.stderr
    write_manifest(own_ascend, msgspec.structs.replace(manifest, graphs=[]))
    done = run_msconv("serve", own_ascend)
    assert done.code == 1
    assert "has no graphs" in done.stderr


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 8, 11, 13, 15])
@pytest.mark.parametrize("positions", [32, 200, 40960])
@pytest.mark.parametrize("page", [16, 128])
def test_a_scenario_fits_the_model_and_asks_as_much_as_wanted(most: int, positions: int, page: int) -> None:
    scenario = make_scenario(1000, positions, page, most)
    every = 15 if positions >= 128 else 14  # too short for an answer that is aborted
    assert scenario.num_prompts == min(most or every, every)
    prompts = [ids for group in scenario.groups for _, _, ids in group]
    assert all(1 <= len(ids) <= max(1, positions - NEW_TOKENS - 2) for ids in prompts)
    assert all(0 <= token < 1000 for ids in prompts for token in ids)
    if not most and positions > 1000:
        lengths = {len(ids) for ids in prompts}
        assert {1, 3, 5, 17, page, page + 22, 200, 300} <= lengths


class Recorded:
    """A client that answers with the prompt's last token."""

    def generate(self, ids: list[int], new: int, **sampling: int) -> list[tuple[list[int], int]]:
        return [([ids[-1]] * new, 0)] * sampling.get("n", 1)

    def logprobs(self, ids: list[int], new: int) -> tuple[list[int], list[float]]:
        return [ids[-1]] * new, [-1.0] * (len(ids) - 1)

    def abort_after(self, ids: list[int], count: int) -> list[int]:
        return [ids[-1]] * count


def test_a_scenario_expects_the_cache_to_have_whole_pages() -> None:
    seen: list[Conversation] = []
    done = run_scenario(make_scenario(1000, 4096, 128), Recorded(), seen.append)
    assert seen == done
    assert len(done) == 16
    assert len(make_scenario(1000, 4096, 128, all_logits=False).groups) == 10
    by_name = {c.name: c for c in done}
    assert by_name["a cached prefix"].expect_cached == 128
    assert sum(c.expect_cached > 0 for c in done) == 1
    assert [c.whole for c in done].count(False) == 1
    assert [c.name for c in done if c.logprobs] == ["log probabilities"]


def test_a_record_holds_for_its_bytes_only(own_ascend: Path) -> None:
    manifest = read_manifest(own_ascend)
    assert manifest.weights
    entry = Rehearsed(
        target="ascend910b",
        weights_digest=manifest.weights.digest,
        graph_digests=sorted(g.digest for g in manifest.graphs_for("ascend910b")),
        sglang="0.5.23",
        mindspore="2.10.0",
        device="1",
        mode="float32",
        flags=[],
        page=128,
        prompts=13,
        tokens=214,
        calls={"decode": 150, "prefill": 18},
        max_call_error=0.0,
        max_logit_error=1e-5,
        bound=1e-4,
    )
    write_manifest(own_ascend, msgspec.structs.replace(manifest, rehearsed=[entry]))
    (standing,) = standings(read_manifest(own_ascend))
    words = (
        "not interpreted - rehearsed: SGLang 0.5.23, float32, 214 tokens and 168 graph calls - "
        "run on a device: never"
    )
    assert standing.words == words
    assert f"ascend910b: {words}" in run_msconv("inspect", own_ascend).stdout
    stale = msgspec.structs.replace(entry, graph_digests=["xxh3:0"])
    write_manifest(own_ascend, msgspec.structs.replace(manifest, rehearsed=[stale]))
    assert read_manifest(own_ascend).rehearsals_for("ascend910b") == []


def test_the_stand_in_is_never_taken_for_an_npu(
    ascend: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.prepare(tmp_path, Device("", 1, 1, "", 0, True))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(server.DEVICE), str(tmp_path / "site")]))
    found = run_msconv("doctor", "--json").json
    (finding,) = [f for f in found["findings"] if f["name"] == "torch_npu"]
    assert finding["state"] == "wrong"
    assert "rehearsal device" in finding["found"]
    assert not found["can"]["serve_npu"]
    done = run_msconv("serve", ascend, "--device", "npu")
    assert done.code != 0
    assert "rehearsal device" in done.stderr


@pytest.fixture
def broken_torch_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real torch_npu on a machine without CANN: torch loads it by itself, and it fails."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    info = tmp_path / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)


@pytest.mark.usefixtures("broken_torch_npu")
def test_a_torch_npu_without_cann_is_in_nobodys_way(own_artifact: Path, checkpoint: Checkpoints) -> None:
    assert run_python("import torch").code != 0
    done = run_msconv("doctor")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout
    assert run_msconv("compile", own_artifact).code == 0
    verified = run_msconv("verify", own_artifact, "--reference", checkpoint("untied"))
    assert verified.code == 0, verified.stderr


@pytest.mark.usefixtures("broken_torch_npu")
def test_where_torch_must_load_it_the_error_says_what_to_do(
    own_artifact: Path, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    done = run_msconv("verify", own_artifact, "--reference", checkpoint("untied"))
    assert done.code == 4, done.stderr
    assert "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stderr


def test_the_runtime_imports_without_the_converter_and_the_rehearsal() -> None:
    """Every module of it, but for those that run in an engine and those that MindSpore's programs run."""
    code = """
import importlib, importlib.util, pkgutil, sys
sys.modules["msconv"] = None
import msconv_runtime
for module in pkgutil.walk_packages(msconv_runtime.__path__, "msconv_runtime."):
    inside = ("sglang.slot", "sglang.prompt_logprobs", "sglang.hidden", "vllm.slot", "vllm.pool")
    if "standins" in module.name or module.name.endswith(inside):
        continue
    importlib.import_module(module.name)
assert not any("rehears" in name for name in sys.modules), sys.modules
print("fine")
"""
    done = run_command([sys.executable, "-c", code], None, 120)
    assert done.stdout == "fine\n", done.stderr

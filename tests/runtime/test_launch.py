"""What `msconv serve` refuses before a byte of the weights is read: all of it at once, with what mends it."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from msgspec.structs import replace

from msconv_runtime.artifact import Parallel, read_manifest, write_manifest
from msconv_runtime.errors import ArtifactError, EnvironmentProblem, UsageError
from msconv_runtime.serving.flags import given_flags
from msconv_runtime.serving.launch import plan_launch
from msconv_runtime.serving.nodes import Nodes
from msconv_runtime.serving.ports import refuse_taken
from msconv_runtime.serving.settings import Settings
from msconv_runtime.sglang.flags import node_flags
from tests.warm import run_warm


@pytest.fixture
def own_ascend(own_artifact: Path) -> Path:
    """An artifact with graphs for a 910B beside those for a CPU."""
    assert run_warm("compile", own_artifact, "--target", "ascend910b").code == 0
    return own_artifact


def launch(artifact: Path, *extra: str) -> list[str]:
    return plan_launch(artifact, "cpu", "127.0.0.1", 30000, list(extra)).argv


def test_a_sound_artifact_gets_its_command(own_artifact: Path) -> None:
    argv = launch(own_artifact, "--max-total-tokens=8192", "--log-level", "debug")
    assert argv[-3:] == ["--max-total-tokens=8192", "--log-level", "debug"]
    assert "--max-total-tokens" not in argv
    assert argv[argv.index("--tp-size") + 1] == "1"


def test_a_missing_rank_file_and_wrong_flags_are_said_together(own_artifact: Path) -> None:
    next((own_artifact / "weights").iterdir()).unlink()
    with pytest.raises(ArtifactError) as e:
        launch(own_artifact, "--tp", "4", "--dtype=bfloat16")
    for words in (
        "model-rank-0-part-0.safetensors",
        "--tp 4",
        "--tp-size 1",
        "--dtype bfloat16",
        "msconv reshard",
    ):
        assert words in e.value.message


def test_a_flipped_byte_in_a_graph_is_refused(own_artifact: Path) -> None:
    graph = own_artifact / "graphs" / "cpu" / "decode.mindir"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"decode\.mindir"):
        launch(own_artifact)


def test_flags_of_another_layout_alone_are_wrong_use(own_artifact: Path) -> None:
    with pytest.raises(UsageError, match="--tensor-parallel-size 2"):
        launch(own_artifact, "--tensor-parallel-size", "2")
    assert launch(own_artifact, "--tp", "1")


def test_a_machine_that_cannot_is_refused(own_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_DEV_FORCE_USE_COMPILE_CACHE", "1")
    with pytest.raises(EnvironmentProblem, match="MS_DEV_FORCE_USE_COMPILE_CACHE"):
        launch(own_artifact)


def test_an_artifact_without_ascend_graphs_has_nothing_for_an_npu(own_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="no graphs for an NPU"):
        plan_launch(own_artifact, "npu", "127.0.0.1", 30000, [])


def test_an_npu_gets_its_command_for_elsewhere_and_is_missed_here(own_ascend: Path) -> None:
    found = plan_launch(own_ascend, "npu", "0.0.0.0", 30000, [], elsewhere=True)
    said = dict(zip(found.argv[3::2], found.argv[4::2], strict=True))
    wanted = {"--device": "npu", "--attention-backend": "ascend", "--dtype": "bfloat16", "--page-size": "128"}
    assert wanted.items() <= said.items()
    assert found.environment == {
        "MSCONV_TARGET": "ascend910b",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with pytest.raises(EnvironmentProblem, match=r"torch_npu[\s\S]*CANN[\s\S]*devices"):
        plan_launch(own_ascend, "npu", "0.0.0.0", 30000, [])


def test_one_of_several_ascend_targets_must_be_named(own_ascend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(own_ascend)
    graphs = own_ascend / "graphs"
    shutil.copytree(graphs / "ascend910b", graphs / "ascend910c")
    other = [
        replace(g, target="ascend910c", path=g.path.replace("910b", "910c"))
        for g in manifest.graphs
        if g.target == "ascend910b"
    ]
    write_manifest(own_ascend, replace(manifest, graphs=[*manifest.graphs, *other]))
    with pytest.raises(UsageError, match="ascend910b, ascend910c"):
        plan_launch(own_ascend, "npu", "0.0.0.0", 30000, [], elsewhere=True)
    monkeypatch.setenv("MSCONV_TARGET", "ascend910c")
    found = plan_launch(own_ascend, "npu", "0.0.0.0", 30000, [], elsewhere=True)
    assert found.environment["MSCONV_TARGET"] == "ascend910c"
    found = plan_launch(own_ascend, "npu", "0.0.0.0", 30000, [], elsewhere=True, target="ascend910b")
    assert found.environment["MSCONV_TARGET"] == "ascend910b"


def test_machines_that_serve_together_are_told_so() -> None:
    nodes = Nodes(2, 1, "10.0.0.7:5000")
    nodes.check(Parallel(4))
    assert nodes.host == "10.0.0.7"
    Nodes(2, 1, "[fe80::1]:65535").check(Parallel(4))
    assert node_flags(nodes) == {"--nnodes": "2", "--node-rank": "1", "--dist-init-addr": "10.0.0.7:5000"}
    Nodes().check(Parallel(1))
    assert node_flags(Nodes()) == {}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (Nodes(2, 2, "a:1"), "--node-rank 2"),
        (Nodes(2, 0, None), "--dist-init-addr"),
        (Nodes(3, 0, "a:1"), "4 ranks"),
        (Nodes(2, 1, "foo"), "foo: is not HOST:PORT"),
        (Nodes(2, 1, ":5000"), "is not HOST:PORT"),
        (Nodes(2, 1, "a:65536"), "is not HOST:PORT"),
        (Nodes(2, 1, "::1:5000"), "is not HOST:PORT"),
    ],
)
def test_machines_that_cannot_be_are_refused(nodes: Nodes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        nodes.check(Parallel(4))


def test_an_empty_host_is_refused(own_artifact: Path) -> None:
    with pytest.raises(UsageError, match="--host: is empty"):
        plan_launch(own_artifact, "cpu", "", 30000, [])


def test_each_copy_of_the_model_gets_its_cores(own_artifact: Path) -> None:
    bind = "SGLANG_CPU_OMP_THREADS_BIND"
    one = plan_launch(own_artifact, "cpu", "127.0.0.1", 30000, ["--dp-size", "1"]).environment
    two = plan_launch(own_artifact, "cpu", "127.0.0.1", 30000, ["--dp-size=2"]).environment
    assert bind not in one
    assert two[bind].count("|") == 1
    assert ("MSCONV_RANKS_HERE" in one, two["MSCONV_RANKS_HERE"]) == (False, "2")


def test_a_cpu_server_takes_the_graphs_for_a_cpu(own_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSCONV_TARGET", "ascend910b")
    found = plan_launch(own_artifact, "cpu", "127.0.0.1", 30000, [])
    assert found.environment["MSCONV_TARGET"] == "cpu"


def test_a_pool_that_does_not_fit_is_refused(own_artifact: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"memory to serve.*smaller --max-total-tokens"):
        plan_launch(own_artifact, "cpu", "127.0.0.1", 30000, ["--max-total-tokens", str(10**12)])


def test_settings_go_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().environment() == {}
    given = Settings(False, True, "read", "ascend310p", "10.0.0.7", 3)
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.read() == given
    for name, value in Settings().environment().items():  # what the user exported does not win over the command
        monkeypatch.setenv(name, value)
    assert Settings.read() == Settings()
    monkeypatch.setenv("MSCONV_LOAD_MODE", "copy")
    with pytest.raises(UsageError, match="mmap or read"):
        Settings.read()


def test_a_port_is_free_or_it_is_said() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=f"port {port}"):
            refuse_taken("127.0.0.1", port)
    refuse_taken("127.0.0.1", port)
    with pytest.raises(EnvironmentProblem, match=r"no\.such\.host\.invalid"):
        refuse_taken("no.such.host.invalid", 30000)


def test_flags_are_read_in_both_spellings() -> None:
    assert given_flags(["--a", "1", "--b=2", "--c", "--d"]) == {"--a": "1", "--b": "2", "--c": "", "--d": ""}

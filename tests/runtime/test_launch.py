"""What `msconv serve` refuses before a byte of the weights is read: all of it at once, with what mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from msconv_runtime.errors import ArtifactError, EnvironmentProblem, UsageError
from msconv_runtime.sglang.launch import given_flags, plan_launch


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


def test_an_npu_is_refused_plainly(own_artifact: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="not there yet"):
        plan_launch(own_artifact, "npu", "127.0.0.1", 30000, [])


def test_flags_are_read_in_both_spellings() -> None:
    assert given_flags(["--a", "1", "--b=2", "--c", "--d"]) == {"--a": "1", "--b": "2", "--c": "", "--d": ""}

"""Serving engines are found by their folders; what an artifact serves on a device is chosen in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from msconv_runtime.artifact import Artifact
from msconv_runtime.doctor import Machine, examine
from msconv_runtime.errors import ArtifactError, UsageError
from msconv_runtime.serving.choice import target_to_serve
from msconv_runtime.serving.engine import Engine, chosen_engine, engine_named, engine_names
from msconv_runtime.sglang.engine import ENGINE
from tests.commands import run_msconv


def with_targets(root: Path, *names: str) -> Artifact:
    """The artifact as if it had graphs for these targets."""
    manifest = Artifact(root).manifest
    graphs = [replace(g, target=name) for name in names for g in manifest.graphs if not g.variant]
    return Artifact(root, replace(manifest, graphs=graphs))


def test_sglang_is_an_engine_and_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSCONV_ENGINE", raising=False)
    assert engine_names() == ["sglang", "vllm"]
    assert chosen_engine() is engine_named("sglang") is ENGINE
    assert isinstance(ENGINE, Engine)


def test_an_engine_that_there_is_not_is_refused(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "serving", "..", "doctor", "sglang/../sglang"):
        with pytest.raises(UsageError, match="no such serving engine"):
            engine_named(name)
    monkeypatch.setenv("MSCONV_ENGINE", "no-such")
    for command in (("serve", compiled), ("doctor",)):
        done = run_msconv(*command)
        assert done.code == 2
        assert "Engines are: sglang, vllm." in done.stderr


def test_doctor_asks_for_no_engines_packages_by_itself() -> None:
    names = {f.name for f in examine(Machine()).findings}
    assert names.isdisjoint({"sglang", "torch_npu", "SGLANG_PLUGINS"})
    assert {"sglang", "torch_npu"} <= {f.name for f in examine(Machine(), needs=ENGINE.needs).findings}


def test_a_device_of_one_target_is_asked_for_no_name(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = with_targets(compiled, "cpu", "ascend310p")
    monkeypatch.setenv("MSCONV_TARGET", "ascend310p")
    assert target_to_serve(artifact, "cpu").name == "cpu"
    assert target_to_serve(artifact, "npu").name == "ascend310p"
    monkeypatch.delenv("MSCONV_TARGET")
    assert target_to_serve(artifact, "npu").name == "ascend310p"


@pytest.mark.parametrize("named", ["cpu", "ascend910c", "nonsense"])
def test_a_name_that_the_artifact_has_no_graphs_for_is_refused(compiled: Path, named: str) -> None:
    with pytest.raises(UsageError, match=f"has graphs for ascend310p, ascend910b, not for {named}") as e:
        target_to_serve(with_targets(compiled, "ascend310p", "ascend910b"), "npu", named)
    assert e.value.hint == "Name one of them: --target ascend310p, or MSCONV_TARGET=ascend310p."


def test_what_is_missing_is_told_with_what_makes_it(compiled: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no graphs\.\n") as e:
        target_to_serve(with_targets(compiled), "cpu")
    assert e.value.hint.endswith("--target cpu` makes them for a CPU, --target ascend910b for an NPU.")
    with pytest.raises(ArtifactError, match="has graphs for ascend910b, none for a CPU") as e:
        target_to_serve(with_targets(compiled, "ascend910b"), "cpu")
    assert "--device npu" in e.value.hint
    with pytest.raises(ArtifactError, match="has no graphs for an NPU") as e:
        target_to_serve(with_targets(compiled, "cpu"), "npu")
    assert "--target ascend910b" in e.value.hint
    with pytest.raises(UsageError, match="--device tpu: cpu or npu"):
        target_to_serve(with_targets(compiled, "cpu"), "tpu")

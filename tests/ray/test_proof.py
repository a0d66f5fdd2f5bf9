"""Proofs by nodes of a Ray cluster on this machine: what they find, whichever of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msconv_runtime.artifact import read_manifest
from tests.checkpoints import make_qwen3
from tests.ray.nodes import ENVIRONMENT, PROOF_BIN, Nodes, nodes
from tests.verify.planting import Ranks, edit_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        not (PROOF_BIN / "ray").exists(), reason="needs an environment of its own: `make test-ray` makes it"
    ),
]
TARGET, LAYERS = "ascend910b", 6
# `msconv` as it is, but every model counts as large: what is done is kept
DRIVER = """
import sys
import msconv.verify.subject as proofs
proofs.LARGE_BYTES = 0
from msconv.cli import main
main()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    for made in nodes(PROOF_BIN):
        made.have(2)
        yield made


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For two ranks, with graphs."""
    directory = tmp_path_factory.mktemp("proof")
    model = make_qwen3(
        directory / "model", "bfloat16", vocab_size=203, hidden_size=64, num_hidden_layers=LAYERS, head_dim=16
    )
    msconv("convert", model, "--tp", 2, "--output", directory / "artifact")
    msconv("compile", directory / "artifact", "--target", TARGET)
    return directory / "artifact"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path)}


def line(*arguments: object) -> list[str]:
    return [str(PROOF_BIN / "python"), "-c", DRIVER, *map(str, arguments)]


def msconv(*arguments: object, exit_code: int = 0, environment: dict[str, str] = ENVIRONMENT) -> str:
    done = subprocess.run(line(*arguments), env=environment, capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def verified(artifact: Path, cluster: Nodes, environment: dict[str, str], exit_code: int = 0) -> dict[str, Any]:
    ray = ("--ray", cluster.address, "--json")
    return dict(json.loads(msconv("verify", artifact, *ray, exit_code=exit_code, environment=environment)))


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What does not hang on time."""
    return {k: v for k, v in found.items() if k not in ("seconds", "seconds_per_gb", "resumed")}


def test_a_proof_is_the_same_whoever_is_killed(
    cluster: Nodes, artifact: Path, environment: dict[str, str]
) -> None:
    whole = verified(artifact, cluster, environment)
    assert whole["ok"] and not whole["resumed"]
    assert list(whole["own_errors"]) == [f"model.layers.{i}" for i in range(LAYERS)]
    assert 0 < whole["deviation_sum"] < whole["bound"]
    (entry,) = read_manifest(artifact).verified
    assert entry.mode.startswith("float32, each layer")
    for victim in ("worker", "driver"):
        driver = subprocess.Popen(
            line("verify", artifact, "--ray", cluster.address, "--json"),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_layers(driver, Path(environment["XDG_CACHE_HOME"]), 2)
        os.kill(cluster.movers()[0] if victim == "worker" else driver.pid, signal.SIGKILL)
        said, told = driver.communicate()
        if victim == "worker":
            assert driver.returncode == 0, told
            assert "its worker was lost" in told
            found = json.loads(said)
        else:
            found = verified(artifact, cluster, environment)
            assert found["resumed"]
        assert numbers(found) == numbers(whole), victim
        assert not list((artifact / ".msconv").glob("proof-*"))


def wait_for_layers(driver: subprocess.Popen[str], cache: Path, count: int) -> None:
    """Until so many were kept."""
    while driver.poll() is None and len(list(cache.rglob("candidate layer *.safetensors"))) < count:
        time.sleep(0.02)
    assert driver.poll() is None, driver.communicate()


def test_a_wrong_weight_of_one_rank_is_found_in_its_layer(
    cluster: Nodes, artifact: Path, environment: dict[str, str]
) -> None:
    def change(ranks: Ranks) -> None:
        bits = ranks[1]["model.layers.3.mlp.down_proj.weight"].reshape(-1)
        bits[(bits & 0x7FFF).argmax()] ^= 0x8000

    edit_weights(artifact, change)
    found = verified(artifact, cluster, environment, exit_code=3)
    assert found["place"].startswith("model.layers.3.mlp, seen at ")
    assert [name for name, error in found["own_errors"].items() if error > found["bound"]] == ["model.layers.3"]
    assert not read_manifest(artifact).verified

"""Quantised repositories: the description comes along, and an index of whatever name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import read_tree
from tests.commands import run_msconv
from tests.hub.server import Hub
from tests.int8_checkpoints import DESCRIPTION, Form, compressed_tensors, modelslim, static_attention
from tests.moe_checkpoints import quantise_fp8
from tests.stream.moe_models import BLOCK, DEEPSEEK, QWEN, random_checkpoint

NAME = "someone/W8A8"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static attention and dynamic experts, in two shards in which few scales lie beside their codes."""
    root = tmp_path_factory.mktemp("mixed")
    source = random_checkpoint(root / "source", QWEN)
    return modelslim(source, root / "W8A8", static_attention, Form(biases=True, stem="quant_model_weight_w8a8"))


def weights(artifact: Path) -> dict[str, bytes]:
    return {name: data for name, data in read_tree(artifact).items() if name.startswith("weights/")}


@pytest.mark.parametrize("options", [(), ("--delete-source-as-you-go",)])
def test_a_repository_of_modelslim_is_what_its_directory_is(
    hub: Hub, mixed: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    hub.add(NAME, mixed)
    here, there = tmp_path / "here", tmp_path / "there"
    for model, out, more in ((mixed, here, ()), (NAME, there, options)):
        done = run_msconv("convert", "--model", model, "--tp", 4, "--ep", 2, "--output", out, *more)
        assert done.code == 0, done.stderr
    assert weights(here) == weights(there)
    assert (here / "config.json").read_bytes() == (there / "config.json").read_bytes()
    assert not (there / DESCRIPTION).exists()
    shards = list((tmp_path / "home").rglob("*.safetensors"))
    assert bool(shards) == (not options)
    assert not list(there.rglob("quant_model_weight*"))


def test_a_repository_of_compressed_tensors_is_what_its_directory_is(hub: Hub, tmp_path: Path) -> None:
    model = compressed_tensors(random_checkpoint(tmp_path / "source", QWEN), tmp_path / "W8A8")
    hub.add(NAME, model)
    for ref, out in ((model, tmp_path / "here"), (NAME, tmp_path / "there")):
        done = run_msconv("convert", "--model", ref, "--tp", 2, "--output", out)
        assert done.code == 0, done.stderr
    assert weights(tmp_path / "here") == weights(tmp_path / "there")


def test_a_repository_in_fp8_is_quantised_while_it_downloads(hub: Hub, tmp_path: Path) -> None:
    model = quantise_fp8(random_checkpoint(tmp_path / "source", DEEPSEEK), tmp_path / "FP8", BLOCK, shards=3)
    hub.add(NAME, model)
    for ref, out in ((model, tmp_path / "here"), (NAME, tmp_path / "there")):
        options = ("--tp", 2, "--ep", 2, "--quant", "w8a8", "--output", out)
        more = ("--delete-source-as-you-go",) if ref == NAME else ()
        done = run_msconv("convert", "--model", ref, *options, *more)
        assert done.code == 0, done.stderr
        assert "become int8" in done.stderr
    assert weights(tmp_path / "here") == weights(tmp_path / "there")


def test_plan_reads_a_quantised_repository_without_its_weights(hub: Hub, mixed: Path) -> None:
    hub.add(NAME, mixed)
    done = run_msconv("plan", "--model", NAME, "--tp", 2, "--json")
    assert done.code == 0, done.stderr
    assert done.json["quant"] == "w8a8-dynamic, w8a8-static"
    assert done.json["download_bytes"] > 0
    assert not any("/stored/" in r.path and not r.range for r in hub.requests)


def test_lint_downloads_and_compares_digests(hub: Hub, mixed: Path) -> None:
    hub.add(NAME, mixed)
    done = run_msconv("lint", NAME, "--json")
    assert done.code == 0, done.stderr
    assert (done.json["shards"], done.json["digests_compared"]) == (2, 2)

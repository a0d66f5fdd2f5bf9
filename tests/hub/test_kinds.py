"""Repositories of kinds that are not read, and what is told of those that are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import run_msconv
from tests.hub.server import Hub
from tests.moe_checkpoints import make_qwen3_moe
from tests.stream.test_stored_names import stack, weights
from tests.synthetic import qwen3_config, write_synthetic

OTHER = "someone/Model"


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("model-Q4_K_M.gguf", "llama.cpp"),
        ("pytorch_model.bin", "never read"),
        ("adapter_model.safetensors", "base model"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_repository_without_weights_that_are_read_is_told_by_kind(
    hub: Hub, tmp_path: Path, file: str, word: str, config: bool
) -> None:
    model = write_synthetic(tmp_path / "m", qwen3_config())
    (model / "model.safetensors").rename(model / file)
    if file.startswith("adapter"):
        (model / "adapter_config.json").write_text("{}")
    if not config:
        (model / "config.json").unlink()
    hub.add(OTHER, model)
    done = run_msconv("convert", "--model", OTHER, "--tp", 1, "--output", tmp_path / "out")
    assert done.code == 1
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_needs_code_is_told_and_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    model = write_synthetic(tmp_path / "m", qwen3_config())
    (model / "tiktoken.model").write_text("x")
    (model / "tokenization_kimi.py").write_text("raise SystemExit")
    hub.add(OTHER, model)
    done = run_msconv("convert", "--model", OTHER, "--tp", 1, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "tiktoken.model, tokenization_kimi.py" in done.stderr
    assert not any("tokenization_kimi.py" in r.path for r in hub.requests)


def test_an_index_beside_one_file_is_refused_on_a_hub_too(hub: Hub, tmp_path: Path) -> None:
    model = write_synthetic(tmp_path / "m", qwen3_config(), shards=2)
    (model / "model.safetensors").write_bytes((model / "model-00001-of-00002.safetensors").read_bytes())
    hub.add(OTHER, model)
    done = run_msconv("convert", "--model", OTHER, "--tp", 1, "--output", tmp_path / "out")
    assert done.code == 1
    assert "model.safetensors.index.json" in done.stderr


def test_stacked_experts_of_a_hub_are_read_in_parts(hub: Hub, tmp_path: Path) -> None:
    plain = make_qwen3_moe(tmp_path / "plain")
    hub.add(OTHER, stack(plain, tmp_path / "stacked", 16))
    for name, model in (("a", plain), ("b", OTHER)):
        done = run_msconv("convert", "--model", model, "--tp", 2, "--ep", 2, "--output", tmp_path / name)
        assert done.code == 0, done.stderr
    assert weights(tmp_path / "a") == weights(tmp_path / "b")

"""A hub on localhost, a checkpoint on it, and what converting that from a directory gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import Result, run_msconv, run_python
from tests.hub.server import Hub
from tests.synthetic import qwen3_config, write_synthetic

NAME = "Qwen/Qwen3-8B"

# `msconv` as it is, but less patient with a hub that fails
HASTY = """
import msconv.checkpoint.transfer as transfer
transfer.FIRST_WAIT_S = 0.01
from msconv.cli import main
main()
"""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint of 25 MB in 8 shards, among files that nobody needs.  To be read, never changed."""
    config = qwen3_config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=2000,
    )
    model = write_synthetic(tmp_path_factory.mktemp("hub") / "Qwen3-8B", config, shards=8)
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    (model / "generation_config.json").write_text("{}")
    for name in ("modeling_qwen3.py", "pytorch_model.bin", "README.md", "consolidated.safetensors"):
        (model / name).write_text("not needed")
    return model


@pytest.fixture(scope="session")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact for four ranks, converted from the directory."""
    out = tmp_path_factory.mktemp("expected") / "out"
    done = run_msconv("convert", "--model", shards, "--tp", 4, "--output", out)
    assert done.code == 0, done.stderr
    return out


@pytest.fixture
def hub(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the checkpoint; commands use it, and a cache of their own that is empty."""
    server = Hub()
    server.add(NAME, shards)
    for key in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET"):
        monkeypatch.delenv(key, raising=False)
    for key, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def hasty() -> Callable[..., Result]:
    """`hasty("convert", ...)`: the command line, with short waits between tries."""
    return lambda *args: run_python(HASTY, *args)

"""Checkpoints with a tokenizer, for servers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.served_models import prompts_for, random_qwen3, reference


@pytest.fixture(scope="session")
def zen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's checkpoint: trained, with a tokenizer and a chat template."""
    from demo.checkpoint import make_checkpoint

    directory = tmp_path_factory.mktemp("zen") / "zen-qwen3"
    make_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def random_checkpoint(zen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the same tokenizer: every token has a say, near-ties are rare."""
    from transformers import AutoConfig

    vocab = AutoConfig.from_pretrained(zen_checkpoint).vocab_size
    directory = tmp_path_factory.mktemp("random") / "random-qwen3"
    random_qwen3(vocab).save_pretrained(directory)
    for path in zen_checkpoint.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="session")
def model(random_checkpoint: Path) -> Any:
    return reference(random_checkpoint)


@pytest.fixture(scope="session")
def prompts(model: Any) -> list[list[int]]:
    return prompts_for(model.config.vocab_size)

"""Checkpoints with a tokenizer, for servers."""

from __future__ import annotations

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
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the same tokenizer: every token has a say, near-ties are rare."""
    from demo.checkpoint import make_tokenizer, zen_lines

    tokenizer = make_tokenizer(zen_lines())
    directory = tmp_path_factory.mktemp("random") / "random-qwen3"
    random_qwen3(-(-len(tokenizer) // 64) * 64).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(random_checkpoint: Path) -> Any:
    return reference(random_checkpoint)


@pytest.fixture(scope="session")
def prompts(model: Any) -> list[list[int]]:
    return prompts_for(model.config.vocab_size)

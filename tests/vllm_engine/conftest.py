"""The servers' checkpoint and prompts, and whether vLLM is here at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import add_tokenizer
from tests.served_models import prompts_for, random_qwen3, reference

CHUNK = 64  # tokens of a server's step


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm_engine" in item.path.parts and item.path.name != "test_refused.py":
                item.add_marker(pytest.mark.skip(reason="needs vLLM: `make test-vllm` has an environment with it"))


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / "random-qwen3"
    random_qwen3(512).save_pretrained(directory)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def model(random_checkpoint: Path) -> Any:
    return reference(random_checkpoint)


@pytest.fixture(scope="session")
def prompts(model: Any) -> list[list[int]]:
    return prompts_for(model.config.vocab_size)

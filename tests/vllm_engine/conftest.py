"""The servers' checkpoint and prompts, and whether vLLM is here at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import add_tokenizer

CHUNK = 64  # tokens of a server's step
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 150, 3, 9)  # around those of a block and of a step


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm_engine" in item.path.parts and item.path.name != "test_refused.py":
                item.add_marker(pytest.mark.skip(reason="needs vLLM: `make test-vllm` has an environment with it"))


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, so large that every token has a say and near-ties are rare."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("random") / "random-qwen3"
    Qwen3ForCausalLM(config).save_pretrained(directory)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def model(random_checkpoint: Path) -> Any:
    """transformers' own model of `random_checkpoint`: what the servers are compared with."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # threads that wait for each other while a server takes all cores
    return AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prompts(model: Any) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in LENGTHS]

"""Checkpoints with a tokenizer, for servers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest


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
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    vocab = AutoModelForCausalLM.from_pretrained(zen_checkpoint).config.vocab_size
    config = Qwen3Config(
        vocab_size=vocab,
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
    for path in zen_checkpoint.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, directory)
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
    """Around the sizes of a page (16) and of the servers' prefill chunk (64)."""
    rng = np.random.default_rng(1)
    lengths = (1, 2, 5, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 150, 3, 9)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]

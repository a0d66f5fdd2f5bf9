"""Checkpoints with a tokenizer, for servers."""

from __future__ import annotations

import shutil
from pathlib import Path

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

"""The model that servers of tests answer with, and what they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (1, 2, 5, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 150, 3, 9)  # around a page of 16 and a step of 64


def random_qwen3(vocab_size: int, **more: Any) -> Any:
    """Random weights, so large that every token has a say and near-ties are rare."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **more,
    )
    return Qwen3ForCausalLM(config)


def reference(directory: Path) -> Any:
    """transformers' own model of a checkpoint: what servers are compared with."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # threads that wait for each other while a server takes all cores
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def prompts_for(vocab_size: int) -> list[list[int]]:
    """Random tokens, of each of LENGTHS."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab_size, n).tolist() for n in LENGTHS]

"""Qwen3 dense, 0.6B to 32B: grouped-query attention with a norm per head on q and k, SwiGLU."""

from __future__ import annotations

from ..layout.model import Table
from .blocks import ATTENTION, DENSE_MLP, DROPS, EMBEDDING, HEAD
from .config import Family

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=Table((*EMBEDDING, *ATTENTION, *DENSE_MLP, *HEAD), DROPS),
    windows_by_layer=True,
)

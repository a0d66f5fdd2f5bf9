"""The servers' checkpoint and prompts, and whether vLLM is here at all."""

from __future__ import annotations

import importlib.util

import pytest

from tests.e2e.conftest import model, prompts, random_checkpoint, zen_checkpoint

__all__ = ["model", "prompts", "random_checkpoint", "zen_checkpoint"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm_engine" in item.path.parts and item.path.name != "test_refused.py":
                item.add_marker(pytest.mark.skip(reason="needs vLLM: `make test-vllm` has an environment with it"))

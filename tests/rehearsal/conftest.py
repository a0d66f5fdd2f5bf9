"""Artifacts for rehearsals: small random models, with graphs for NPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import make_qwen3
from tests.moe_checkpoints import make_deepseek_v3, make_qwen3_moe
from tests.warm import run_warm

Artifacts = Callable[..., Path]
MAKERS = {"qwen3": make_qwen3, "qwen3_moe": make_qwen3_moe, "deepseek_v3": make_deepseek_v3}


@pytest.fixture(scope="session")
def npu_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """`npu_artifact("qwen3", "ascend910b", 2)`: made once.  Rehearsals are recorded in it."""
    root = tmp_path_factory.mktemp("rehearsed")

    def artifact(family: str, target: str, tp: int = 1, ep: int = 1, quant: str = "") -> Path:
        model, out = root / family, root / f"{family}{quant}-{target}-tp{tp}-ep{ep}"
        if not model.exists():
            long = {"max_position_embeddings": 2048} if family == "deepseek_v3" else {}
            MAKERS[family](model, dtype="bfloat16", initializer_range=0.2, **long)
        quantised = ("--quant", quant) if quant else ()
        if not out.exists():
            for line in (
                ("convert", "--model", model, "--tp", tp, "--ep", ep, "--output", out, *quantised),
                ("compile", out, "--target", target),
            ):
                done = run_warm(*line)
                assert done.code == 0, done.stderr
        return out

    return artifact

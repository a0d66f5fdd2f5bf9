"""Every family in vLLM's offline engine, twice, the second time with all whole blocks from the cache: the
tokens and log probabilities of transformers.  What the engine is told otherwise is refused before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.servers import make_artifact
from tests.moe_checkpoints import dequantised, make_deepseek_v3, make_qwen3_moe, quantise_fp8

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

BLOCK, CHUNK, NEW = 16, 32, 12
BOUND = 1e-3  # float32 sums in another order: about 1e-5 is found
LENGTHS = (1, 7, 16, 17, 33, 70)
SERVED = [
    ("qwen3_moe", 1, 1),
    ("deepseek_v3", 1, 1),
    ("deepseek_v3 FP8", 1, 1),
    ("qwen3_moe", 2, 2),
    ("deepseek_v3", 2, 1),
]


def run(place: Path, root: Path, tp: int, prompts: list[list[int]], **options: Any) -> tuple[Any, str]:
    """What `offline.py` wrote (None: it failed), and its log."""
    asked = {"root": str(root), "tp": tp, "prompts": prompts, "new": NEW, "chunk": CHUNK, "options": options}
    (place / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "tests.vllm_engine.offline", place / "asked.json", place / "gave.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    log = done.stdout + done.stderr
    return (None if done.returncode else json.loads((place / "gave.json").read_text())), log


def greedy(model: Any, ids: list[int]) -> list[int]:
    """transformers' continuation; a token that ends texts is one like others."""
    import torch

    known = list(ids)
    for _ in range(NEW):
        known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(ids) :]


@pytest.mark.parametrize(("kind", "tp", "ep"), SERVED)
def test_a_family_gives_transformers_answers(tmp_path: Path, kind: str, tp: int, ep: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    if kind == "qwen3_moe":
        source = reference = make_qwen3_moe(tmp_path / "source")
    elif kind == "deepseek_v3":
        source = reference = make_deepseek_v3(tmp_path / "source")
    else:
        source = quantise_fp8(make_deepseek_v3(tmp_path / "source", "bfloat16"), tmp_path / "fp8", shards=3)
        reference = dequantised(source, tmp_path / "wide")
    root = make_artifact(source, tmp_path / "artifact", tp, ep)
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in LENGTHS]
    wanted = [greedy(model, ids) for ids in prompts]

    gave, log = run(tmp_path, root, tp, prompts)
    assert gave, log[-5000:]
    for answers in gave["rounds"]:
        assert [a["tokens"] for a in answers] == wanted
        for answer, ids in zip(answers, prompts, strict=True):
            logits = model(torch.tensor([ids + answer["tokens"]])).logits[0, len(ids) - 1 : -1]
            right = logits.log_softmax(-1)[range(NEW), answer["tokens"]]
            assert (torch.tensor(answer["logprobs"]) - right).abs().max() < BOUND
    assert gave["hits"] == [0, sum((n - 1) // BLOCK * BLOCK for n in LENGTHS)]
    assert "compiles since ready: " not in log
    if tp == 1:
        assert gave["state"]["compiles_since_ready"] == 0
        assert len(gave["state"]["graphs"]) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype is bfloat16, not float32"),
        ({"hf_overrides": {"architectures": ["MsconvForCausalLM"], "vocab_size": 7}}, "hf_overrides is"),
        ({"load_format": "dummy"}, "load_format is dummy, not msconv"),
    ],
)
def test_python_arguments_that_do_not_fit_are_refused(
    compiled: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    gave, log = run(tmp_path, compiled, 1, [[1, 2]], **options)
    assert gave is None
    assert said in log
    assert "msconv_runtime.vllm.arguments" in log

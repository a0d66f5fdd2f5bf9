"""lm-evaluation-harness asks a served artifact, and runs transformers on the same checkpoint: the same numbers.

In an environment of its own, which `make eval` makes.  Its tasks are files here: nothing is asked of a network.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from demo.checkpoint import make_tokenizer, zen_lines
from tests.checkpoints import make_qwen3
from tests.e2e.servers import make_artifact, serving
from tests.moe_checkpoints import make_deepseek_v3

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / ".venv-eval" / "bin" / "lm_eval"
TASKS = ("msconv_ending", "msconv_choice", "msconv_continuation")
BOUND = 1e-3  # of a log likelihood: a sum of some tokens', each of which may differ by 1e-4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not HARNESS.exists(), reason="needs a third environment: `make eval` makes it"),
]


@dataclass(frozen=True)
class Evaluation:
    """By task: metrics, and of each document what the model answered."""

    metrics: dict[str, dict[str, float]]
    answers: dict[str, list[Any]]


def evaluate(out: Path, kind: str, **arguments: object) -> Evaluation:
    """One run of the harness over all tasks."""
    offline = {"HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [HARNESS, "run", "--model", kind, "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += ["--tasks", ",".join(TASKS), "--include_path", "tests/eval/tasks", "--device", "cpu"]
    command += ["--log_samples", "--output_path", out]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    metrics = {
        task: {name: value for name, value in found.items() if isinstance(value, float)}
        for task, found in json.loads(results.read_text())["results"].items()
    }
    answers = {}
    for task in TASKS:
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda s: s["doc_id"])
        answers[task] = [s["filtered_resps"] for s in samples]
    return Evaluation(metrics, answers)


def likelihoods(answers: list[Any]) -> list[tuple[float, bool]]:
    """(log likelihood, whether it is what greedy decoding gives) of each continuation."""
    return [(float(value), str(is_greedy) == "True") for of_one in answers for value, is_greedy in of_one]


def best(answers: list[Any]) -> list[int]:
    """The continuation that each document's model finds the likeliest."""
    return [max(range(len(of_one)), key=lambda i: float(of_one[i][0])) for of_one in answers]


def qwen3(directory: Path, vocab: int) -> None:
    make_qwen3(directory, vocab_size=vocab, max_position_embeddings=512, initializer_range=0.2)


def deepseek_v3(directory: Path, vocab: int) -> None:
    make_deepseek_v3(directory, vocab_size=vocab)


@pytest.mark.parametrize("make", [qwen3, deepseek_v3])
def test_the_harness_finds_what_it_finds_with_transformers(
    make: Callable[[Path, int], None], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "model"
    tokenizer = make_tokenizer(zen_lines())
    make(checkpoint, len(tokenizer))
    tokenizer.save_pretrained(checkpoint)
    artifact = make_artifact(checkpoint, tmp_path / "artifact")
    wanted = evaluate(tmp_path / "hf", "hf", pretrained=checkpoint, dtype="float32")
    with serving(artifact, tmp_path / "server.log") as server:
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        served = {"model": artifact, "base_url": url, "tokenizer": artifact, "max_length": 256}
        one = evaluate(tmp_path / "one", "local-completions", **served)
        many = evaluate(tmp_path / "many", "local-completions", **served, num_concurrent=8)
    for found in (one, many):
        for task in TASKS[:2]:
            pairs = list(zip(likelihoods(found.answers[task]), likelihoods(wanted.answers[task]), strict=True))
            assert len(pairs) == {"msconv_ending": 8, "msconv_choice": 24}[task]
            assert max(abs(a - b) for (a, _), (b, _) in pairs) < BOUND
            assert all(a == b for (_, a), (_, b) in pairs)
        assert best(found.answers["msconv_choice"]) == best(wanted.answers["msconv_choice"])
        assert found.answers["msconv_continuation"] == wanted.answers["msconv_continuation"]
        for task, metrics in wanted.metrics.items():
            assert found.metrics[task] == pytest.approx(metrics, rel=BOUND, nan_ok=True)
    assert len({str(a) for a in wanted.answers["msconv_continuation"]}) > 1

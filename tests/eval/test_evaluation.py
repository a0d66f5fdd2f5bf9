"""lm-evaluation-harness asks a served artifact, and runs transformers on the same checkpoint: the same numbers.

In an environment of its own, which `make eval` makes.  Its tasks are files here: nothing is asked of a network.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from demo.checkpoint import make_tokenizer, zen_lines
from tests.checkpoints import make_qwen3
from tests.e2e.servers import make_artifact, serving
from tests.moe_checkpoints import make_deepseek_v3

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-eval" / "bin" / "python"
LIKELIHOODS = {"msconv_ending": 8, "msconv_choice": 24}  # how many
TASKS = (*LIKELIHOODS, "msconv_continuation")
BOUND = 1e-3  # of a log likelihood: a sum of some tokens', each of which may differ by 1e-4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(600),  # 80 s where nothing else runs; a server may take 240 s to start
    pytest.mark.skipif(not PYTHON.exists(), reason="needs a third environment: `make eval` makes it"),
]


@dataclass(frozen=True)
class Evaluation:
    """By task: metrics, and of each document what the model answered."""

    metrics: dict[str, dict[str, float]]
    answers: dict[str, list[Any]]


def offline(root: Path) -> dict[str, str]:
    """One thread: two that wait for each other take minutes where a server runs beside them."""
    return {
        **os.environ,
        "HF_HOME": str(root / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class Harness:
    """A process of the harness, asked for one evaluation after another."""

    process: subprocess.Popen[str]
    root: Path

    def evaluate(self, name: str, kind: str, **arguments: object) -> Evaluation:
        out = self.root / f"{name}.json"
        asked = {"model": kind, "model_args": arguments, "tasks": TASKS, "out": out}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked, default=str) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line == "done\n":
                found = json.loads(out.read_text())
                return evaluation(found["results"], found["samples"])
        pytest.fail((self.root / "harness.log").read_text()[-3000:])


@contextmanager
def harness(root: Path) -> Iterator[Harness]:
    command = [PYTHON, "-m", "tests.eval.harness"]
    pipe = subprocess.PIPE
    with (
        (root / "harness.log").open("w") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=offline(root), stdin=pipe, stdout=pipe, stderr=log, text=True
        ) as process,
    ):
        try:
            yield Harness(process, root)
        finally:
            process.kill()


def by_command(root: Path, kind: str, **arguments: object) -> Evaluation:
    """The same by the harness's own command line."""
    command = [PYTHON, "-m", "lm_eval", "run", "--model", kind]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += ["--tasks", ",".join(TASKS), "--include_path", "tests/eval/tasks", "--device", "cpu"]
    command += ["--log_samples", "--output_path", root]
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=offline(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = root.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = root.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return evaluation(json.loads(results.read_text())["results"], samples)


def evaluation(results: dict[str, Any], samples: dict[str, list[Any]]) -> Evaluation:
    metrics = {
        task: {name: v for name, v in found.items() if isinstance(v, float) and "_stderr" not in name}
        for task, found in results.items()
    }
    answers = {
        task: [s["filtered_resps"] for s in sorted(of_task, key=lambda s: s["doc_id"])]
        for task, of_task in samples.items()
    }
    return Evaluation(metrics, answers)


def likelihoods(answers: list[Any]) -> list[tuple[float, bool]]:
    """(log likelihood, whether it is what greedy decoding gives) of each continuation."""
    return [(float(value), str(is_greedy) == "True") for of_one in answers for value, is_greedy in of_one]


def best(answers: list[Any]) -> list[int]:
    """The continuation that each document's model finds the likeliest."""
    return [max(range(len(of_one)), key=lambda i: float(of_one[i][0])) for of_one in answers]


def check(found: Evaluation, wanted: Evaluation) -> None:
    for task, count in LIKELIHOODS.items():
        pairs = list(zip(likelihoods(found.answers[task]), likelihoods(wanted.answers[task]), strict=True))
        assert len(pairs) == count
        difference = max(abs(a - b) for (a, _), (b, _) in pairs)
        print(f"{task}: log likelihoods differ by {difference:.1e} at most")
        assert difference < BOUND
        assert all(a == b for (_, a), (_, b) in pairs)
    assert best(found.answers["msconv_choice"]) == best(wanted.answers["msconv_choice"])
    assert found.answers["msconv_continuation"] == wanted.answers["msconv_continuation"]
    for task, metrics in wanted.metrics.items():
        assert metrics
        assert found.metrics[task] == pytest.approx(metrics, rel=BOUND, nan_ok=True)


def qwen3(directory: Path, vocab: int) -> None:
    make_qwen3(directory, vocab_size=vocab, max_position_embeddings=512, initializer_range=0.2)


def deepseek_v3(directory: Path, vocab: int) -> None:
    make_deepseek_v3(directory, vocab_size=vocab)


@pytest.mark.parametrize("make", [qwen3, deepseek_v3])
def test_the_harness_finds_what_it_finds_with_transformers(
    make: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """One request at a time, by the command line for one of the families, and eight at once."""
    checkpoint = tmp_path / "model"
    tokenizer = make_tokenizer(zen_lines())
    make(checkpoint, len(tokenizer))
    tokenizer.save_pretrained(checkpoint)
    artifact = make_artifact(checkpoint, tmp_path / "artifact")
    with harness(tmp_path) as lm_eval, serving(artifact, tmp_path / "server.log") as server:
        wanted = lm_eval.evaluate("hf", "hf", pretrained=checkpoint, dtype="float32")
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        served = {"model": artifact, "base_url": url, "tokenizer": artifact, "max_length": 256}
        if make is qwen3:
            one = by_command(tmp_path / "one", "local-completions", **served)
        else:
            one = lm_eval.evaluate("one", "local-completions", **served)
        many = lm_eval.evaluate("many", "local-completions", **served, num_concurrent=8)
    for found in (one, many):
        check(found, wanted)
    assert len({str(a) for a in wanted.answers["msconv_continuation"]}) > 1

"""int8 artifacts in a real SGLang server on a CPU: its tokens are those of the reference that is led."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msconv.steps.compile import compile_graphs
from msconv.verify.int8.codes import Record
from msconv.verify.int8.reference import QuantisedReference
from msconv.verify.lockstep import Lockstep
from msconv_runtime.artifact import Artifact
from msconv_runtime.kernels import library
from msconv_runtime.roles import COMPILED
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.e2e.servers import serving
from tests.every import one_of_many
from tests.moe_checkpoints import make_deepseek_v3, make_qwen3_moe

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(library().path is None, reason="needs a C++ compiler"),
]
FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen3": make_qwen3,
    "qwen3_moe": make_qwen3_moe,
    "deepseek_v3": make_deepseek_v3,
}
NEW = 12
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 20, 31, 32, 33, 40, 47, 50)
FLIPPED = 5e-2  # what a code that the server rounds the other way than the interpreter may do to a logit


@pytest.mark.parametrize(
    "family",
    ["qwen3", *(pytest.param(name, marks=one_of_many("test-servers")) for name in ("qwen3_moe", "deepseek_v3"))],
)
def test_tokens_are_the_led_references(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](tmp_path / "model", initializer_range=0.3)
    root = tmp_path / "artifact"
    convert(model, root, quant="w8a8")
    compile_graphs(root, "cpu")
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 500, n).tolist() for n in LENGTHS]
    with serving(root, tmp_path / "log", "--skip-tokenizer-init") as server:
        alone = server.answers(prompts, NEW)
        at_once = server.answers(prompts, NEW, at_once=True)
        assert server.state()["compiles_since_ready"] == 0
    best, ties = 0, 0
    for answers in (alone, at_once):
        for logits, answer, decided in led(model, root, prompts, answers):
            for row, token in zip(logits[:decided], answer, strict=False):
                lead = float(row.max() - row[token])
                assert lead < FLIPPED
                best, ties = best + (lead == 0), ties + (lead > 0)
    assert best >= 0.6 * len(prompts) * NEW * 2  # those after a router's tie are not judged
    assert ties <= 0.01 * best


def led(
    model: Path, root: Path, prompts: list[list[int]], answers: list[list[int]]
) -> list[tuple[np.ndarray, list[int], int]]:
    """For each prompt the led reference's logits [NEW, V] after it and each answered token, the answer, and how
    many of them come before a router's tie."""
    artifact = Artifact(root)
    candidate = Lockstep(artifact, "cpu", variant=COMPILED)
    reference = QuantisedReference(model, artifact.manifest)
    sequences = [p + a for p, a in zip(prompts, answers, strict=True)]
    moe = reference.moe
    record = Record((len(sequences), max(map(len, sequences))), 1, 1, moe.experts if moe else 0)
    candidate.hear(record)
    candidate.prefill(prompts)
    record.place([(i, t) for i, p in enumerate(prompts) for t in range(len(p))], "prefill")
    for step in range(NEW):
        candidate.decode([a[step] for a in answers])
        record.place([(i, len(p) + step) for i, p in enumerate(prompts)], "decode")
    traces, verdict = reference.led_traces(sequences, record)
    assert verdict.unexplained == 0, verdict.place
    return [
        (t.logits[len(p) - 1 : -1], a, t.decided - len(p) + 1)
        for t, p, a in zip(traces, prompts, answers, strict=True)
    ]

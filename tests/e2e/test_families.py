"""Every family in the real SGLang server, one rank and two, against transformers' greedy tokens."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import logprobs
from tests.e2e.servers import expected, left_after, make_artifact, serving
from tests.every import one_of_many
from tests.moe_checkpoints import add_mtp, dequantised, make_deepseek_v3, make_qwen3_moe, quantise_fp8

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

NEW_TOKENS = 12
CHUNK = 32


SERVED = [
    ("deepseek_v3 FP8", 1, 1),
    ("qwen3_moe", 2, 2),
    *(
        pytest.param(*layout, marks=one_of_many("test-servers"))
        for layout in (("deepseek_v3", 2, 2), ("qwen3_moe", 1, 1), ("deepseek_v3", 1, 1), ("qwen3_moe", 2, 1))
    ),
]
END_S = 15  # after this no process of a server may be left


@pytest.mark.parametrize(("kind", "tp", "ep"), SERVED)
def test_a_server_gives_transformers_tokens(kind: str, tp: int, ep: int, tmp_path: Path) -> None:
    """Sixteen prompts at once and one after another, one longer than a chunk, one with a cached prefix; SIGTERM
    ends it, and every rank."""
    import torch
    from transformers import AutoModelForCausalLM

    source = reference = tmp_path / "model"
    if kind == "qwen3_moe":
        make_qwen3_moe(source)
    elif kind == "deepseek_v3":
        make_deepseek_v3(source)
    else:
        source = quantise_fp8(add_mtp(make_deepseek_v3(source, "bfloat16")), tmp_path / "fp8", shards=3)
        reference = dequantised(source, tmp_path / "wide")
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    rng = np.random.default_rng(5)
    lengths = (1, 5, 16, 17, 33, 3, 70, 9, 2, 15, 31, 48, 63, 64, 65, 90)
    prompts = [rng.integers(3, model.config.vocab_size, n).tolist() for n in lengths]
    wanted = [expected(model, ids, NEW_TOKENS) for ids in prompts]
    artifact = make_artifact(source, tmp_path / "artifact", tp, ep)
    flags = ("--chunked-prefill-size", str(CHUNK), "--skip-tokenizer-init")
    with serving(artifact, tmp_path / "server.log", *flags) as server:
        for at_once in (True, False):
            assert server.answers(prompts, NEW_TOKENS, at_once) == wanted
        again = server.generate(prompts[6], NEW_TOKENS)
        assert again["meta_info"]["cached_tokens"] > 0
        assert again["output_ids"] == wanted[6]
        with ThreadPoolExecutor(4) as pool:
            for ids, answer in zip(
                prompts, pool.map(lambda ids: logprobs.ask(server, ids, len(ids) // 3), prompts), strict=True
            ):
                logprobs.check(model, ids, len(ids) // 3, answer)
        processes = server.processes()
        server.process.send_signal(signal.SIGTERM)
        assert left_after(processes, END_S) == []
    assert server.process.wait() == 0

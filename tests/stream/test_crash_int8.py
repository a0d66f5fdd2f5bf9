"""kill -9 while a conversion quantises, or moves what is quantised: run again, and the bytes are those of a quiet
run."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command
from tests.every import EVERY
from tests.int8_checkpoints import Form, modelslim, static_attention
from tests.moe_checkpoints import quantise_fp8
from tests.stream.crashes import FAULTS
from tests.stream.moe_models import BLOCK, DEEPSEEK, random_checkpoint

pytestmark = pytest.mark.slow

TINY = DEEPSEEK | {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "vocab_size": 40}
TINY |= {"num_experts_per_tok": 2}
MOMENTS, FEWEST = (40, 30) if EVERY else (16, 12)


def sweep(model: Path, root: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """kill -9 at so many moments of a conversion; half of the runs that resume are killed too."""
    monkeypatch.setenv("MSCONV_NUMBA", "0")  # which would compile anew in each of many processes
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    spec = {"do": "kill", "times": 1, "begin": "nothing", "durable_every": 4000, "seed": seed}
    spec |= {"root": str(root), "jobs": [1, 2, 3], "most": MOMENTS}
    line = [sys.executable, str(FAULTS), "--sweep", json.dumps(spec), "convert", "--model", str(model)]
    done = run_command([*line, "--tp", "2", "--ep", "2", *options], None, 500)
    assert done.code == 0, done.stderr
    assert not done.json["problems"], "\n".join(done.json["problems"])
    return done.json


def test_a_kill_at_any_moment_of_quantising_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = random_checkpoint(tmp_path / "plain", TINY)
    model = quantise_fp8(plain, tmp_path / "FP8", BLOCK, shards=2)
    assert sweep(model, tmp_path / "sweep", monkeypatch, "--quant", "w8a8")["ended"] >= FEWEST


def test_a_kill_at_any_moment_of_moving_codes_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = random_checkpoint(tmp_path / "plain", TINY)
    model = modelslim(plain, tmp_path / "W8A8", static_attention, Form(biases=True))
    assert sweep(model, tmp_path / "sweep", monkeypatch)["ended"] >= FEWEST

"""SGLang's offline engine, as the documentation shows it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.e2e.servers import expected, make_artifact

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def example() -> str:
    """The indented block of the page that makes an engine."""
    blocks = PAGE.read_text().split("\n\n    from msconv_runtime.sglang.environment import use_cpu\n")
    assert len(blocks) == 2
    lines = ["    from msconv_runtime.sglang.environment import use_cpu", *blocks[1].splitlines()]
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return textwrap.dedent("\n".join(lines[:end]))


def test_the_readme_example_runs_as_written(zen_checkpoint: Path, tmp_path: Path) -> None:
    """In a directory where the artifact has the page's name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_artifact(zen_checkpoint, tmp_path / "artifacts" / "Qwen3-0.6B-tp1")
    script = tmp_path / "example.py"
    script.write_text(example())
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(zen_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(zen_checkpoint, dtype=torch.float32).eval()
    wanted = tokenizer.decode(expected(model, tokenizer("Beautiful is")["input_ids"], 8))
    answer = done.stdout.splitlines()[-1]  # it ends where the model ends it
    assert len(answer) > 10
    assert wanted.startswith(answer)

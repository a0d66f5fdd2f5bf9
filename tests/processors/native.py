"""A tiny artifact's tokens in a session that may use one variant of the kernels and no other."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS = [[1, 2, 3], list(range(5, 75)), [9]]
NEW_TOKENS = 6
CODE = """
import json, sys
from msconv_runtime import Session
from msconv_runtime.kernels import library
session = Session(sys.argv[1])
tokens = session.generate(json.loads(sys.argv[2]), int(sys.argv[3]))
print(json.dumps([library().variant, session.graphs.is_compiled, tokens]))
"""


def tokens_with(variant: str, artifact: Path) -> list[list[int]]:
    """Greedy tokens of all prompts at once.  Kernels are loaded once a process, so this is one of its own."""
    command = [sys.executable, "-c", CODE, str(artifact), json.dumps(PROMPTS), str(NEW_TOKENS)]
    environment = {**os.environ, "MSCONV_KERNELS": variant, "MSCONV_COMPILED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    name, is_compiled, tokens = json.loads(done.stdout.splitlines()[-1])
    assert (name, is_compiled) == (variant, True)
    return tokens  # type: ignore[no-any-return]


@functools.cache
def transformers_tokens(checkpoint: Path) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        found.append(out[0, len(prompt) :].tolist())
    return found

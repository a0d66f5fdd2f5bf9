"""The data of this directory: two checkpoints, and artifacts of them that the code of 07fe90e made and proved.

With that code's `converter` and `runtime` first on PYTHONPATH: `python -m tests.format1.make DIRECTORY`.  It was
the last one that wrote manifests of format 1.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.commands import run_msconv
from tests.digests.models import DEEPSEEK_V3, qwen3, write_checkpoint
from tests.published import deepseek_v3
from tests.synthetic import qwen3_config

VOCAB = 64
QWEN3: dict[str, Any] = qwen3_config(
    num_hidden_layers=2, head_dim=8, max_position_embeddings=256, vocab_size=VOCAB
)
DEEPSEEK: dict[str, Any] = DEEPSEEK_V3 | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "vocab_size": VOCAB,
}
MADE = (  # artifact, its checkpoint, tp, targets
    ("qwen3-tp1", "qwen3", 1, ("cpu",)),
    ("qwen3-tp2", "qwen3", 2, ("cpu", "ascend910b")),
    ("deepseek_v3-tp1", "deepseek_v3", 1, ("cpu",)),
)


def make_checkpoints(directory: Path) -> None:
    write_checkpoint(directory / "qwen3", QWEN3, qwen3(QWEN3), 1)
    write_checkpoint(directory / "deepseek_v3", DEEPSEEK, deepseek_v3(DEEPSEEK), 1)
    for name in ("qwen3", "deepseek_v3"):
        write_tokenizer(directory / name)


def write_tokenizer(directory: Path) -> None:
    """A token a word; what is no word is <unk>."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"word{i}": i for i in range(3, VOCAB)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Make all in the directory that is given: it must not be there."""
    directory = Path(sys.argv[1])
    make_checkpoints(directory)
    for name, checkpoint, tp, targets in MADE:
        root = directory / name
        commands: list[tuple[object, ...]] = [
            ("convert", "--model", directory / checkpoint, "--tp", tp, "--output", root)
        ]
        for target in targets:
            commands += [("compile", root, "--target", target), ("verify", root, "--target", target)]
        for command in commands:
            done = run_msconv(*command)
            assert done.code == 0, done.stderr
        shutil.rmtree(root / ".msconv")
        (root / "report.html").unlink()


if __name__ == "__main__":
    main()

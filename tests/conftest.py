"""Checkpoints and commands that all tests share."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_qwen3
from tests.commands import Result, run_msconv

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="msconv-tests-")  # proofs made here are none of the user's

Checkpoints = Callable[[str], Path]


def add_tokenizer(checkpoint: Path) -> None:
    """A tokenizer.json of single letters, so that a server can be asked for."""
    letters = [chr(c) for c in range(33, 127)] + ["\u0120"]  # the last is how byte-level tokenizers write a space
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": bytes_,
        "decoder": bytes_,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))


VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "other_seed": {"seed": 7},
    "tied": {"tie_word_embeddings": True},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.2,
        },
        "max_position_embeddings": 256,
    },
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.5}},
    "attention_bias": {"attention_bias": True},
    "bfloat16_shards": {"dtype": "bfloat16", "shards": 12},
    "float16": {"dtype": "float16"},
    "short_context": {"max_position_embeddings": 32},
    "sixteen_heads": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 16},
}


LONG = ("e2e", "verify", "rehearsal", "docs", "cli")  # directories whose files take minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: at the end, no worker waits for another."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        directory = item.path.relative_to(here).parts[0]
        return LONG.index(directory) if directory in LONG else len(LONG)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def engine_of_no_other_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever command line a test reads, the next one begins with no engine chosen."""
    monkeypatch.setenv("MSCONV_ENGINE", "")  # so that it is put back
    monkeypatch.delenv("MSCONV_ENGINE")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """`checkpoint("tied")`: the directory of a variant, made once.  To be read, never changed."""
    root = tmp_path_factory.mktemp("checkpoints")

    def variant(name: str) -> Path:
        if not (root / name).exists():
            make_qwen3(root / name, **VARIANTS[name])
        return root / name

    return variant


@pytest.fixture
def own_checkpoint(checkpoint: Checkpoints, tmp_path: Path) -> Checkpoints:
    """`own_checkpoint("tied")`: a copy that the test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint(name), tmp_path / f"own-{name}"))

    return copy


@pytest.fixture(scope="session")
def msconv() -> Callable[..., Result]:
    """`msconv("convert", ...)`: runs the command line, returns exit code, stdout and stderr."""
    return run_msconv


@pytest.fixture(scope="session")
def compiled(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole artifact of `untied` for one rank, with CPU graphs, unproven.  To be read, never changed."""
    from msconv.steps.compile import compile_graphs
    from tests.conversions import prepare, run

    root = tmp_path_factory.mktemp("compiled") / "untied-tp1"
    source = Path(shutil.copytree(checkpoint("untied"), root.parent / "source" / "untied"))
    add_tokenizer(source)
    run(prepare(source, 1, output=root))
    compile_graphs(root, "cpu")
    return root


@pytest.fixture
def own_artifact(compiled: Path, tmp_path: Path) -> Path:
    """A copy of `compiled` that the test may change."""
    return Path(shutil.copytree(compiled, tmp_path / "own-artifact"))

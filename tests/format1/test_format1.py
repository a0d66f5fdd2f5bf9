"""Artifacts that the code of 07fe90e made, in the first format of the manifest, in today's hands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv_runtime import Session
from msconv_runtime.artifact import FORMAT, digest_bytes, read_manifest
from tests.checkpoints import read_rank, read_tree
from tests.commands import Result, run_msconv
from tests.digests.table import msconv
from tests.e2e.servers import expected, serving
from tests.every import one_of_many
from tests.format1.make import MADE

HERE = Path(__file__).parent
CHECKPOINTS = {name: HERE / checkpoint for name, checkpoint, _, _ in MADE}
TARGETS = {name: targets for name, _, _, targets in MADE}
ONE_RANK = [name for name, _, tp, _ in MADE if tp == 1]
TODAY = {"native": "mixed_compiled", "decode_all": "verify"}
PROMPTS = [[5, 9, 33, 2, 60], [7], list(range(3, 40))]
NEW_TOKENS = 8

Old = Callable[[str], Path]


@pytest.fixture
def old(tmp_path: Path) -> Old:
    """`old("qwen3-tp1")`: a copy that may be changed."""
    return lambda name: Path(shutil.copytree(HERE / name, tmp_path / name))


def answers(checkpoint: Path) -> list[list[int]]:
    """transformers' greedy tokens for the prompts, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return [expected(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


def proven(inspected: Result) -> set[str]:
    """Targets whose proof still holds, as `inspect --json` has them."""
    return {target for target, proof in inspected.json["proven"].items() if proof}


@pytest.mark.parametrize("name", TARGETS)
def test_they_are_of_the_first_format(name: str) -> None:
    raw = json.loads((HERE / name / "msconv.json").read_text())
    assert raw["format"] == 1
    phases = {(g["target"], g["phase"]) for g in raw["graphs"]}
    assert {target for target, _ in phases} == set(TARGETS[name])
    read = {(g.target, g.name) for g in read_manifest(HERE / name).graphs}
    assert read == {(target, TODAY.get(phase, phase)) for target, phase in phases}


def test_a_format_newer_than_todays_is_refused_with_both_numbers(old: Old) -> None:
    root = old("qwen3-tp1")
    path = root / "msconv.json"
    path.write_text(path.read_text().replace('"format": 1', f'"format": {FORMAT + 1}'))
    (root / "READY").write_text(digest_bytes(path.read_bytes()) + "\n")
    for command in ("inspect", "verify", "serve"):
        done = run_msconv(command, root)
        assert done.code == 1
        words = f"this artifact has format {FORMAT + 1}; this msconv reads formats up to {FORMAT}"
        assert words in " ".join(done.stderr.split())
        assert "Upgrade msconv" in done.stderr


@pytest.mark.parametrize("name", TARGETS)
def test_they_are_whole_and_still_proven(name: str, old: Old) -> None:
    root = old(name)
    before = read_tree(root)
    done = run_msconv("inspect", root, "--check", "--json")
    assert done.code == 0, done.stderr
    assert proven(done) == set(TARGETS[name])
    assert read_tree(root) == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [(name, target) for name in TARGETS for target in TARGETS[name]])
def test_they_are_proven_again(name: str, target: str, old: Old) -> None:
    """Afterwards the manifest is of today's format, and no other file has changed."""
    root = old(name)
    before = read_tree(root)
    msconv("verify", root, "--target", target, "--reference", CHECKPOINTS[name])
    assert run_msconv("inspect", root, "--check").code == 0
    after = read_tree(root)
    assert {path for path in after if after[path] != before.get(path)} <= {"msconv.json", "READY"}
    assert all(read_manifest(root).proof_for(t) for t in TARGETS[name])


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("name", ONE_RANK)
def test_a_session_gives_transformers_tokens(name: str, is_compiled: bool) -> None:
    """One after another and together: a decode graph has a least number of sequences, or has not."""
    wanted = answers(CHECKPOINTS[name])
    session = Session(HERE / name, check_digests=True, compiled=is_compiled)
    assert session.graphs.is_compiled == is_compiled
    assert session.generate(PROMPTS, NEW_TOKENS) == wanted
    assert [session.generate([prompt], NEW_TOKENS)[0] for prompt in PROMPTS] == wanted


@one_of_many("test-servers")
@pytest.mark.e2e
@pytest.mark.slow
def test_a_server_of_two_ranks_gives_transformers_tokens(old: Old, tmp_path: Path) -> None:
    with serving(old("qwen3-tp2"), tmp_path / "server.log", "--chunked-prefill-size", "32") as server:
        assert server.state()["graphs"] == ["mixed_compiled"]
        assert server.answers(PROMPTS, NEW_TOKENS) == answers(CHECKPOINTS["qwen3-tp2"])


def test_resharded_they_have_the_bytes_of_one_that_was_converted(old: Old, tmp_path: Path) -> None:
    done = run_msconv("reshard", old("qwen3-tp2"), "--tp", 1, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    found, wanted = read_rank(tmp_path / "out", 0), read_rank(HERE / "qwen3-tp1", 0)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert np.array_equal(tensor.bits, wanted[name].bits), name


@pytest.mark.slow
def test_compiled_again_their_graphs_have_todays_names_and_no_old_one_is_left(old: Old) -> None:
    """The other target's graphs, and its proof, stay."""
    root = old("qwen3-tp2")
    msconv("compile", root, "--target", "ascend910b")
    graphs = {path.name: path.read_bytes() for path in (root / "graphs/ascend910b").iterdir()}
    before = {path.stem: path.read_bytes() for path in (HERE / "qwen3-tp2/graphs/ascend910b").iterdir()}
    assert graphs == {f"{TODAY.get(stem, stem)}.mindir": data for stem, data in before.items()}
    assert {path.stem for path in (root / "graphs/cpu").iterdir()} == {"prefill", "decode", "native"}
    done = run_msconv("inspect", root, "--check", "--json")
    assert done.code == 0
    assert proven(done) == {"cpu", "ascend910b"}

"""Flags of speculative decoding against the artifacts: what does not fit is said before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from msconv.steps.compile import compile_graphs
from msconv_runtime.artifact import Artifact, read_manifest, write_manifest
from msconv_runtime.doctor import Machine, examine
from msconv_runtime.errors import UsageError
from msconv_runtime.roles import VERIFY
from msconv_runtime.serving.launch import plan_launch
from msconv_runtime.sglang import speculation
from msconv_runtime.targets import CPU
from msconv_runtime.targets.ascend import ASCEND910B
from tests.checkpoints import make_qwen3
from tests.commands import run_msconv
from tests.conftest import Checkpoints, add_tokenizer
from tests.conversions import prepare, run

NGRAM = ("--speculative-algorithm", "NGRAM")
CHAIN = ("--speculative-ngram-max-bfs-breadth", "1")
STEPS, TOPK, DRAFTS = "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens"


def launch(artifact: Path, *extra: str) -> Any:
    return plan_launch(artifact, "cpu", "127.0.0.1", 30000, list(extra))


def standalone(draft: Path | str) -> tuple[str, ...]:
    return ("--speculative-algorithm", "standalone", "--speculative-draft-model-path", str(draft))


def refused(artifact: Path, *flags: str) -> str:
    """The one line that says why the artifact is not served with these flags."""
    with pytest.raises(UsageError) as e:
        launch(artifact, *flags)
    (line,) = e.value.message.splitlines()[1:]
    return line


def without_all_logits(root: Path) -> None:
    """As an artifact of before there were such graphs."""
    manifest = read_manifest(root)
    write_manifest(root, replace(manifest, graphs=[g for g in manifest.graphs if g.role != VERIFY.name]))


@pytest.mark.parametrize(
    "flags",
    [(*NGRAM, "--page-size", "1"), (*NGRAM, *CHAIN), ("--speculative-algorithm", "ngram", *CHAIN)],
    ids=" ".join,
)
def test_ngram_is_served_with_a_word_about_temperature(compiled: Path, flags: tuple[str, ...]) -> None:
    found = launch(compiled, *flags)
    assert found.argv[-len(flags) :] == list(flags)
    assert found.untried == ()
    (note,) = found.notes
    assert "temperature" in note
    assert launch(compiled).notes == ()


def test_a_draft_that_fits_is_served(compiled: Path, own_artifact: Path) -> None:
    flags = standalone(own_artifact)
    assert launch(compiled, *flags, STEPS, "3", TOPK, "1").untried == ()
    done = run_msconv("serve", compiled, "--print-command", "--", *flags)
    assert done.code == 0
    assert "temperature" in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (NGRAM, "--page-size 1, or --speculative-ngram-max-bfs-breadth 1"),
        (("--speculative-algorithm", "EAGLE"), "has no graphs that draft"),
        (("--speculative-algorithm", "EAGLE3"), "Give --speculative-draft-model-path ARTIFACT"),
        (("--speculative-algorithm", "nextn"), "has no graphs that draft"),
        (("--speculative-algorithm", "DFLASH"), "NGRAM, STANDALONE, EAGLE, NEXTN and EAGLE3 are served"),
        (("--speculative-algo", "NGRAM"), "in full"),
        (("--speculative-algorithm", "STANDALONE"), "Give --speculative-draft-model-path ARTIFACT"),
        (standalone("/no/such"), "is no artifact"),
        (("--speculative-draft-model-path", "/x"), "asks for nothing without"),
        ((STEPS, "3"), f"{STEPS}: asks for nothing without --speculative-algorithm"),
        ((*NGRAM, *CHAIN, "--speculative-draft-model-path", "/x"), "drafts without a model"),
        ((*NGRAM, *CHAIN, TOPK, "4"), f"{TOPK}: {DRAFTS} and --speculative-ngram-min-bfs-breadth and"),
        ((*NGRAM, *CHAIN, "--speculative-draft-attention-backend", "triton"), "attend"),
        ((*NGRAM, *CHAIN, "--speculative-accept-threshold-single", "0.5"), "the target says the same"),
        ((*NGRAM, *CHAIN, "--speculative-ngram-external-corpus-path", "x"), "that the server has seen"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_refused_in_one_line(compiled: Path, flags: tuple[str, ...], told: str) -> None:
    assert told in refused(compiled, *flags)


def test_a_draft_that_branches_needs_pages_of_one_token(compiled: Path) -> None:
    flags = (*standalone(compiled), STEPS, "3", TOPK, "4", DRAFTS, "8")
    assert "Give --page-size 1" in refused(compiled, *flags)
    assert launch(compiled, *flags, "--page-size", "1").untried == ()


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((STEPS, "0", TOPK, "1"), f"{STEPS} 0: is no whole number of at least 1"),
        ((STEPS, "-1", TOPK, "1"), f"{STEPS} -1: is no whole number"),
        ((STEPS, "3", TOPK, "x"), f"{TOPK} x: is no whole number"),
        ((STEPS, "3", TOPK, "1", DRAFTS, "1"), f"{DRAFTS} 1: is no whole number of at least 2"),
        ((STEPS, "5"), f"{STEPS} 5: needs {TOPK} and {DRAFTS} too"),
        ((TOPK, "1"), f"needs {STEPS} and {DRAFTS} too"),
        ((STEPS, "3", TOPK, "2"), f"needs {DRAFTS} too"),
        ((STEPS, "2", TOPK, "2", DRAFTS, "8"), "make 6 guesses, one less than are verified.  Give at most 7"),
        ((STEPS, "9999", TOPK, "1", "--max-total-tokens", "4096"), "needs 9999 tokens of the cache"),
    ],
)
def test_counts_of_a_model_that_sglang_would_end_on(compiled: Path, counts: tuple[str, ...], told: str) -> None:
    """Before anything loads: some of the three alone, none at all, more than there are."""
    assert told in refused(compiled, *standalone(compiled), "--page-size", "1", *counts)


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((DRAFTS, "0"), f"{DRAFTS} 0: is no whole number of at least 2"),
        (("--speculative-ngram-max-bfs-breadth", "0"), "max-bfs-breadth 0: is no whole number of at least 1"),
        (("--speculative-ngram-min-bfs-breadth", "11"), "is more than --speculative-ngram-max-bfs-breadth, 10"),
        ((DRAFTS, "100000000"), "Give fewer"),
    ],
)
def test_counts_of_ngrams_that_sglang_would_end_on(compiled: Path, counts: tuple[str, ...], told: str) -> None:
    assert told in refused(compiled, *NGRAM, "--page-size", "1", *counts)


def test_graphs_without_all_logits_are_told_by_serve_and_doctor(compiled: Path, own_artifact: Path) -> None:
    without_all_logits(own_artifact)
    compile_ = f"`msconv compile {own_artifact} --target cpu`"
    assert compile_ in refused(own_artifact, *NGRAM, *CHAIN)
    assert compile_ in refused(compiled, *standalone(own_artifact))
    findings = {f.name: f for f in examine(Machine(), own_artifact).findings}
    assert findings["all logits cpu"].state == "missing"
    assert findings["all logits cpu"].stops == ()
    assert "all logits cpu" not in {f.name for f in examine(Machine(), compiled).findings}


def convert(checkpoint: Path, root: Path, tp: int = 1) -> Path:
    run(prepare(checkpoint, tp, output=root))
    compile_graphs(root, "cpu")
    return root


def test_a_draft_of_another_vocabulary_is_refused(compiled: Path, tmp_path: Path) -> None:
    make_qwen3(tmp_path / "small", vocab_size=1001)
    draft = convert(tmp_path / "small", tmp_path / "draft")
    assert "has a vocabulary of 1001 tokens, its target one of 1003" in refused(compiled, *standalone(draft))


def test_a_draft_of_another_tokenizer_is_refused(
    compiled: Path, own_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = own_checkpoint("other_seed")
    launch(compiled, *standalone(convert(source, tmp_path / "none")))
    add_tokenizer(source)
    path = source / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(data))
    draft = convert(source, tmp_path / "other")
    assert "another tokenizer than its target: 'A' is 33 there, 32 here" in refused(compiled, *standalone(draft))


def test_a_draft_of_another_layout_without_graphs_or_damaged_is_refused(
    compiled: Path, own_artifact: Path, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    split = convert(checkpoint("untied"), tmp_path / "tp2", 2)
    assert "is for tp 2, ep 1, its target for tp 1, ep 1" in refused(compiled, *standalone(split))
    graph = own_artifact / "graphs" / "cpu" / "decode.mindir"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    assert "graphs/cpu/decode.mindir" in refused(compiled, *standalone(own_artifact))
    write_manifest(own_artifact, replace(read_manifest(own_artifact), graphs=[]))
    assert "has no graphs" in refused(compiled, *standalone(own_artifact))


def test_a_drafts_memory_counts(compiled: Path, own_artifact: Path) -> None:
    """A copy takes as much as the target."""

    def needed(*drafts: Artifact) -> float:
        report = examine(Machine(), compiled, tokens=1 << 20, drafts=drafts)
        (finding,) = (f for f in report.findings if f.name == "memory to serve")
        return float(finding.needed.split(" ")[0])

    (draft,) = speculation.drafts(dict(zip(*[iter(standalone(own_artifact))] * 2, strict=True)))
    assert needed(draft) == pytest.approx(2 * needed(), rel=0.05)
    assert speculation.drafts({"--speculative-algorithm": "NGRAM"}) == []
    assert speculation.drafts({"--speculative-algorithm": "STANDALONE", "--speculative-draft-model": "/no"}) == []


def test_ngram_without_a_compiler_and_on_an_npu_is_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict([NGRAM, CHAIN])
    artifact = Artifact(compiled)
    monkeypatch.setattr(speculation.shutil, "which", lambda tool: None)
    (line,) = speculation.speculation_problems(artifact, CPU, given)
    assert "Install c++ and ninja" in line
    monkeypatch.setattr(Artifact, "graphs", lambda self, target: [])
    assert "has it for no NPU" in speculation.speculation_problems(artifact, ASCEND910B, given)[-1]

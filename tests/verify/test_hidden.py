"""Hidden states for a draft: every token's, beside the logits, in all graphs that serve."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from msconv.graph.decoder import DecoderWithDraft
from msconv.steps.compile import compile_graphs
from msconv.verify.lockstep import Lockstep
from msconv.verify.prove import prove
from msconv_runtime import Session
from msconv_runtime.artifact import Artifact, Draft, write_manifest
from msconv_runtime.errors import ArtifactError, UsageError
from msconv_runtime.roles import DECODE, HIDDEN, LOGITS, PREFILL, VERIFY
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.moe_checkpoints import make_deepseek_v3
from tests.rehearsal.rehearsing import every_layout
from tests.verify.hidden_faults import streams_exchanged

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12] * 20]
NEXT = [[3], [4], [5]]
MORE = [[1, 2, 3], [4], [5, 6]]
STREAMS = [0, 2]

Expected = tuple[list[np.ndarray], list[np.ndarray]]


def with_draft(model: Path, root: Path, layers: list[int], target: str, tp: int = 1) -> Artifact:
    convert(model, root, tp)
    Artifact(root).changed(draft=Draft("eagle3", layers))
    compile_graphs(root, target)
    return Artifact(root)


def reference(model: Path, layers: list[int]) -> Callable[[list[list[int]]], Expected]:
    """Hidden states and logits of every token: the last norm's output, or what enters the layers, side by side."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")

    def run(sequences: list[list[int]]) -> Expected:
        hidden, logits = [], []
        for tokens in sequences:
            with torch.no_grad():
                found = loaded(torch.tensor([tokens]), output_hidden_states=True)
            of_layers = found.hidden_states  # what enters each layer, then the last norm's output
            chosen = [of_layers[i] for i in layers] or [of_layers[-1]]
            hidden.append(torch.cat(chosen, -1)[0].numpy())
            logits.append(found.logits[0].numpy())
        return hidden, logits

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_qwen3(root / "qwen3", vocab_size=203, num_hidden_layers=3),
        "deepseek_v3": make_deepseek_v3(root / "deepseek", vocab_size=203),
    }


@pytest.mark.parametrize(
    ("name", "layers", "tp", "target"),
    [
        ("qwen3", STREAMS, 2, "ascend910b"),
        pytest.param("deepseek_v3", [], 1, "cpu", marks=every_layout),
        pytest.param("qwen3", STREAMS, 2, "cpu", marks=every_layout),
        pytest.param("deepseek_v3", [], 2, "ascend310p", marks=every_layout),
        pytest.param("deepseek_v3", [1], 2, "ascend910b", marks=every_layout),
    ],
)
def test_interpreted(
    name: str, layers: list[int], tp: int, target: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Of every graph: prompts, one token, several after a prefix, all logits."""
    found = with_draft(models[name], tmp_path / name, layers, target, tp)
    run = reference(models[name], layers)
    for variant in sorted({g.variant for g in found.graphs(target)}):
        lockstep = Lockstep(found, target, variant=variant)
        lockstep.begin(len(PROMPTS))
        before: list[list[int]] = [[] for _ in PROMPTS]
        for role, new in ((PREFILL, PROMPTS), (DECODE, NEXT), (PREFILL, MORE), (VERIFY, MORE)):
            outputs = lockstep.run(role, new)
            before = [b + n for b, n in zip(before, new, strict=True)]
            hidden, logits = run(before)
            tails = [h[-len(n) :] for h, n in zip(hidden, new, strict=True)]
            assert np.abs(outputs[HIDDEN] - np.concatenate(tails)).max() < 1e-4, (variant, role)
            every = [row for s, n in zip(logits, new, strict=True) for row in s[-len(n) :]]
            expected = every if role is VERIFY else [s[-1] for s in logits]
            assert np.abs(outputs[LOGITS] - np.stack(expected)).max() < 1e-4, (variant, role)


def test_layers_exchanged_in_the_model_are_found(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are the same, and what a draft reads is not."""
    sound = with_draft(models["qwen3"], tmp_path / "sound", STREAMS, "ascend910b")
    wrong = Path(shutil.copytree(sound.root, tmp_path / "wrong"))
    monkeypatch.setattr(DecoderWithDraft, "construct", streams_exchanged)
    compile_graphs(wrong, "ascend910b", lambda line: None)
    monkeypatch.undo()
    outputs = []
    for root in (sound.root, wrong):
        lockstep = Lockstep(Artifact(root), "ascend910b")
        lockstep.begin(len(PROMPTS))
        outputs.append(lockstep.run(PREFILL, PROMPTS))
    right, found = outputs
    assert np.array_equal(right[LOGITS], found[LOGITS])
    assert np.abs(right[HIDDEN] - found[HIDDEN]).max() > 0.01
    proof = prove(wrong, "ascend910b", models["qwen3"])
    assert not proof.ok
    assert proof.place == "hidden states, seen in prefill"
    assert proof.comparison.max_abs_logit_error < 1e-4
    assert prove(sound.root, "ascend910b", models["qwen3"]).ok


def test_in_a_session(models: dict[str, Path], tmp_path: Path) -> None:
    """MindSpore's own run, by both sets of graphs; a prompt that is cut into calls keeps its order."""
    found = with_draft(models["qwen3"], tmp_path / "artifact", [1], "cpu")
    prompts = [[7, 8, 9], [1] * 700, [2, 3]]
    hidden, logits = reference(models["qwen3"], [1])(prompts)
    for compiled in (False, True):
        session = Session(found.root, compiled=compiled)
        outputs = session.run("prefill", prompts)
        assert np.abs(outputs[HIDDEN] - np.concatenate(hidden)).max() < 1e-4
        assert np.abs(outputs[LOGITS] - np.stack([s[-1] for s in logits])).max() < 1e-4


def test_what_an_artifact_without_a_draft_gives(models: dict[str, Path], tmp_path: Path) -> None:
    """Logits alone; a manifest that says otherwise is refused."""
    convert(models["qwen3"], tmp_path / "plain")
    compile_graphs(tmp_path / "plain", "ascend910b")
    plain = Artifact(tmp_path / "plain")
    assert {tuple(o.name for o in g.outputs) for g in plain.graphs("ascend910b")} == {(LOGITS,)}
    assert b'"draft"' not in (plain.root / "msconv.json").read_bytes()
    for layers, problem in (([0], r"gives \['logits'\]"), ([2, 1], "in ascending order"), ([-1], "no few")):
        write_manifest(plain.root, msgspec.structs.replace(plain.manifest, draft=Draft("eagle3", layers)))
        with pytest.raises(ArtifactError, match=problem):
            Artifact(plain.root)


@pytest.mark.parametrize("layers", [[3], [0, 3]])
def test_layers_that_there_are_not(models: dict[str, Path], layers: list[int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a draft reads layers"):
        with_draft(models["qwen3"], tmp_path / "artifact", layers, "ascend910b")

"""What a graph returns is its role's: several outputs, of some tokens or all; graphs need not read all weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msconv.mindir.program import parse
from msconv.steps.compile import compile_graphs
from msconv.verify.lockstep import Lockstep, check_declared
from msconv_runtime import Session
from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import ArtifactError, UsageError, VerificationFailed
from msconv_runtime.roles import HIDDEN, LOGITS, ROLES, Role
from msconv_runtime.targets import CPU, TARGETS, Target
from tests.conftest import Checkpoints
from tests.conversions import convert

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12] * 20]
BOTH = Role("both", begins=True, outputs=(LOGITS, HIDDEN))
EVERY = Role("every", begins=True, rows="all", outputs=(HIDDEN, LOGITS))
VECTOR = Role("vector", begins=True, outputs=(HIDDEN,))
TOY = replace(CPU, name="toy", graphs=(*CPU.graphs[:2], ("both", ""), ("every", ""), ("vector", "")))
HALF = replace(TARGETS["ascend910b"], name="half", graphs=(*TARGETS["ascend910b"].graphs, ("both", "")))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for role in (BOTH, EVERY, VECTOR):
        monkeypatch.setitem(ROLES, role.name, role)
    for target in (TOY, HALF):
        monkeypatch.setitem(TARGETS, target.name, target)


def artifact(checkpoint: Checkpoints, root: Path, tp: int, target: Target) -> Artifact:
    convert(checkpoint("untied"), root, tp)
    compile_graphs(root, target.name)
    return Artifact(root)


def interpreted(found: Artifact, target: Target, role: Role, exact: bool = True) -> dict[str, np.ndarray]:
    lockstep = Lockstep(found, target.name, exact)
    lockstep.begin(len(PROMPTS))
    return lockstep.run(role, PROMPTS)


def reference(model: Path) -> dict[str, list[np.ndarray]]:
    """Of each prompt, hidden states and logits of every token."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    hidden = []
    with torch.no_grad():
        for prompt in PROMPTS:
            hidden.append(loaded.model(torch.tensor([prompt])).last_hidden_state[0])
        logits = [loaded.lm_head(h).numpy() for h in hidden]
    return {HIDDEN: [h.numpy() for h in hidden], LOGITS: logits}


@pytest.mark.slow
def test_a_role_has_its_outputs_in_the_runtime_and_in_the_interpreter(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = artifact(checkpoint, tmp_path / "artifact", 1, TOY)
    graphs = {g.role: g for g in found.graphs("toy")}
    assert {name: [o.name for o in g.outputs] for name, g in graphs.items()} == {
        "prefill": [LOGITS],
        "decode": [LOGITS],
        "both": [LOGITS, HIDDEN],
        "every": [HIDDEN, LOGITS],
        "vector": [HIDDEN],
    }
    assert {p.name for p in graphs["both"].reads} - {p.name for p in graphs["vector"].reads} == {"lm_head.weight"}
    expected = reference(checkpoint("untied"))
    last = {name: np.stack([rows[-1] for rows in of]) for name, of in expected.items()}
    every = {name: np.concatenate(of) for name, of in expected.items()}
    session = Session(found.root, "toy")
    for role, wanted in ((BOTH, last), (EVERY, every), (VECTOR, {HIDDEN: last[HIDDEN]})):
        for outputs in (session.run(role.name, PROMPTS), interpreted(found, TOY, role)):
            assert list(outputs) == list(role.outputs)
            for name, values in wanted.items():
                np.testing.assert_allclose(outputs[name], values, atol=1e-4, err_msg=f"{role.name}: {name}")
    assert session.lengths == [len(p) for p in PROMPTS]
    with pytest.raises(UsageError, match="no such graph role"):
        session.run("none", PROMPTS)
    with pytest.raises(ArtifactError, match="no mixed graph among"):
        session.run("mixed", PROMPTS)


@pytest.mark.slow
def test_several_ranks_and_half_precision_return_them_too(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = artifact(checkpoint, tmp_path / "artifact", 2, HALF)
    (graph,) = [g for g in found.graphs("half") if g.role == "both"]
    assert [(o.name, o.dtype) for o in graph.outputs] == [(LOGITS, "float32"), (HIDDEN, "bfloat16")]
    outputs, expected = interpreted(found, HALF, BOTH), reference(checkpoint("untied"))
    for name in (LOGITS, HIDDEN):
        np.testing.assert_allclose(outputs[name], np.stack([rows[-1] for rows in expected[name]]), atol=1e-4)
    rounded = interpreted(found, HALF, BOTH, exact=False)[HIDDEN]
    assert 0 < np.abs(rounded - outputs[HIDDEN]).max() < 0.5


@pytest.mark.slow
def test_a_file_with_other_outputs_than_its_entry_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = artifact(checkpoint, tmp_path / "artifact", 1, TOY)
    graphs = {g.role: g for g in found.graphs("toy")}
    program = parse(found.root / graphs["both"].path)
    assert program.num_outputs == 2
    assert parse(found.root / graphs["vector"].path).num_outputs == 1
    check_declared(found, graphs["both"], program)
    with pytest.raises(VerificationFailed, match="has 2 outputs, its manifest entry names 1"):
        check_declared(found, graphs["prefill"], program)


def test_targets_and_roles_are_known_without_a_heavy_library() -> None:
    code = "import sys, msconv_runtime.roles; print({'numpy', 'mindspore', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_cpu_is_the_first_target_and_each_is_there_once() -> None:
    built_in = [name for name in TARGETS if name not in ("toy", "half")]
    assert built_in == ["cpu", "ascend910b", "ascend910c", "ascend310p", "onnx"]
    assert {"prefill", "decode", "verify", "mixed"} <= set(ROLES)

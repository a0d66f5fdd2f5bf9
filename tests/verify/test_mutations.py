"""Planted faults: each takes the proof away, and the place of each is named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msconv.steps.compile import compile_graphs
from msconv.steps.conversion import run
from msconv.verify.compare import compare
from msconv.verify.prove import prove
from msconv_runtime.artifact import read_manifest
from msconv_runtime.errors import VerificationFailed
from tests.checkpoints import make_qwen3
from tests.conversions import prepare
from tests.verify.faults import FAULTS, attention
from tests.verify.planting import Fault, edit_graphs, edit_weights
from tests.warm import run_warm

pytestmark = pytest.mark.slow

TARGETS = ("ascend910b", "ascend310p", "cpu")
TINY: dict[str, Any] = {
    "vocab_size": 203,  # odd: the last rank is padded
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "attention_bias": True,
}
BY_NAME = {fault.name: fault for fault in FAULTS}


class Remembered:
    """The reference, which computes each sequence once for all tests."""

    def __init__(self, reference: Any) -> None:
        self.reference, self.weights = reference, reference.weights
        self.known: dict[tuple[tuple[int, ...], ...], Any] = {}

    def traces(self, sequences: list[list[int]]) -> Any:
        key = tuple(map(tuple, sequences))
        if key not in self.known:
            self.known[key] = self.reference.traces(sequences)
        return list(self.known[key])  # whoever draws again changes the list


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for two ranks without a fault.  To be read, never changed."""
    directory = tmp_path_factory.mktemp("sound")
    root = directory / "artifact"
    run(prepare(make_qwen3(directory / "model", **TINY), 2, output=root))
    for target in TARGETS:
        compile_graphs(root, target)
    return root


@pytest.fixture(scope="module")
def reference(sound: Path) -> Remembered:
    from msconv.verify.reference import Reference, source_of

    return Remembered(Reference(source_of(sound, None), read_manifest(sound)))


@pytest.fixture
def own(sound: Path, reference: Remembered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """A copy that the test may change; proofs take the remembered reference and fewer steps of decode."""
    import torch

    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    monkeypatch.setattr("msconv.verify.subject.Reference", lambda *_: reference)
    monkeypatch.setattr("msconv.verify.subject.compare", lambda *a, **k: compare(*a, **{**k, "steps": 2}))
    return lambda: Path(shutil.copytree(sound, tmp_path / "own"))


def named(root: Path, target: str, refused: bool = False) -> str:
    """What a proof that must fail names: its first divergence, or the node that cannot be run."""
    try:
        proof = prove(root, target, None)
    except VerificationFailed as e:
        return e.message
    assert not proof.ok, f"proven, with errors of {proof.comparison.max_abs_logit_error:.1e}"
    assert not refused, f"ran, where it should have been refused: {proof.comparison}"
    assert read_manifest(root).proof_for(target) is None
    return proof.comparison.first


def test_there_are_faults_enough_and_each_has_its_own_name() -> None:
    assert len(BY_NAME) == len(FAULTS) >= 25
    assert {fault.target for fault in FAULTS} == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_fault_the_same_edits_leave_a_proof(own: Callable[[], Path], target: str) -> None:
    root = own()
    edit_weights(root, lambda ranks: None)
    edit_graphs(root, target, ("prefill", "decode", "verify"), lambda edit: None)
    proof = prove(root, target, None)
    assert proof.ok, proof.comparison
    assert proof.comparison.max_abs_logit_error < 1e-4
    assert read_manifest(root).proof_for(target) is not None


@pytest.mark.parametrize("name", BY_NAME)
def test_a_planted_fault_is_caught_and_its_place_named(own: Callable[[], Path], name: str) -> None:
    fault: Fault = BY_NAME[name]
    root = own()
    fault.plant(root)
    place = named(root, fault.target, fault.refused)
    assert re.search(fault.place, place), f"named: {place!r}"


def _zeros(mask: Any, phase: str) -> Any:
    return mask * 0


def _opposite(mask: Any, phase: str) -> Any:
    return -mask


def _transposed(mask: Any, phase: str) -> Any:
    return mask.T if phase == "prefill" else mask


def _itself_hidden(mask: Any, phase: str) -> Any:
    import torch

    return torch.triu(torch.ones_like(mask)) * mask.flatten()[1] if phase == "prefill" else mask


def _other_convention(mask: Any, phase: str) -> Any:
    """bfloat16 masks hold 1.0, float16 masks -10000."""
    if phase != "prefill":
        return mask
    return mask / -10000.0 if float(mask.min()) < 0 else mask * -10000.0


def _zeros_on_a_prefix(mask: Any, phase: str) -> Any:
    return mask if phase == "prefill" else mask * 0


def _ones_for_a_prefix(mask: Any, phase: str) -> Any:
    return mask if phase == "prefill" else mask / -10000.0


def _a_column_late(mask: Any, phase: str) -> Any:
    return mask if phase == "prefill" or len(mask) == 1 else mask.roll(1, 1)


MASKS = {
    "zeros": (_zeros, "ascend910b", "in prefill"),
    "zeros in float16": (_zeros, "ascend310p", "in prefill"),
    "the wrong sign": (_opposite, "ascend910b", "in prefill"),
    "the wrong sign in float16": (_opposite, "ascend310p", "in prefill"),
    "the past hidden": (_transposed, "ascend910b", "in prefill"),
    "a token hidden from itself": (_itself_hidden, "ascend910b", "in prefill"),
    "float16's values in bfloat16": (_other_convention, "ascend910b", "in prefill"),
    "bfloat16's values in float16": (_other_convention, "ascend310p", "in prefill"),
    "zeros on a cached prefix": (_zeros_on_a_prefix, "ascend910b", "in prefill on a cached prefix"),
    "ones on a cached prefix": (_ones_for_a_prefix, "ascend310p", "in prefill on a cached prefix"),
    "a column late": (_a_column_late, "ascend910b", "in prefill on a cached prefix"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_wrong_mask_fails_in_the_first_attention(
    own: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import torch

    from msconv.verify import lockstep

    spoil, target, phase = MASKS[name]
    right = lockstep.attention_mask

    def wrong(is_prefill: bool, *more: Any) -> Any:
        mask = torch.from_numpy(right(is_prefill, *more))
        return spoil(mask, "prefill" if is_prefill else "decode").numpy().copy()

    monkeypatch.setattr(lockstep, "attention_mask", wrong)
    assert re.search(attention(0) + ".* " + phase + "$", named(own(), target))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gate and up are exchanged", "model.layers.0.mlp"),
        ("the files of two ranks are exchanged", "lm_head"),
        ("a sum is a maximum", "AllReduce"),
    ],
)
def test_verify_exits_3_and_says_where(own: Callable[[], Path], name: str, place: str) -> None:
    root = own()
    BY_NAME[name].plant(root)
    done = run_warm("verify", root, "--target", "ascend910b")
    assert done.code == 3
    assert place in done.stderr
    assert "Traceback" not in done.stderr

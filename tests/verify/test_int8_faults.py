"""Planted faults in int8 artifacts: the place of each is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from msconv.cli.verify import command
from msconv.steps.compile import compile_graphs
from msconv.verify.prove import prove
from msconv_runtime.artifact import Artifact, Graph, read_manifest, write_manifest
from msconv_runtime.errors import UsageError, VerificationFailed
from msconv_runtime.targets import target_named
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.modelslim import write_modelslim
from tests.moe_checkpoints import make_deepseek_v3, quantise_fp8
from tests.verify import int8_faults
from tests.verify.int8_faults import TARGET
from tests.verify.planting import Fault

pytestmark = pytest.mark.slow

DENSE: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
EXPERTS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
}
STORED = [("dense", f) for f in int8_faults.DENSE_WEIGHTS] + [("experts", f) for f in int8_faults.EXPERT_WEIGHTS]
RUN = [("dense", f) for f in (*int8_faults.RUN_WEIGHTS, *int8_faults.DENSE_GRAPHS)]
RUN += [("experts", f) for f in int8_faults.EXPERT_GRAPHS]
(FAULT,) = (f for f in int8_faults.DENSE_GRAPHS if f.name == "the offset is 0")


@dataclass(frozen=True)
class Sound:
    """An artifact without a fault, its reference, and the same artifact with the graph of prompts alone: that one
    finds what is wrong with weights, or with every graph."""

    root: Path
    reference: Any
    prompts: Path


class AnyGraphs(Artifact):
    """An artifact that need not have what a server does."""

    def graphs(self, target: str) -> list[Graph]:
        return self.manifest.graphs_for(target)


def kind(name: str) -> str:
    return "W8A8" if ".layers.0." in name else "W8A8_DYNAMIC"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    from msconv.verify.int8.reference import QuantisedReference

    directory = tmp_path_factory.mktemp("int8-faults")
    plain = make_qwen3(directory / "plain", "bfloat16", **DENSE)
    dense = write_modelslim(plain, directory / "dense", kind, shifted=True)
    experts = quantise_fp8(make_deepseek_v3(directory / "wide", **EXPERTS), directory / "experts", (32, 32))
    convert(dense, directory / "dense-tp2", 2)
    convert(experts, directory / "experts-tp4", 4, ep=2, quant="w8a8", dtype="bfloat16")
    found = {}
    for name, source, root in (
        ("dense", dense, directory / "dense-tp2"),
        ("experts", experts, directory / "experts-tp4"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if name == "experts":  # no test takes its other graphs
                prompts = replace(target_named(TARGET), graphs=(("prefill", ""),))
                patch.setattr("msconv.steps.compile.target_named", lambda _, prompts=prompts: prompts)
            compile_graphs(root, TARGET)
        reference = QuantisedReference(source, read_manifest(root))
        found[name] = Sound(root, reference, with_graphs(root, directory / f"{name}-prompts", "prefill"))
    return found


def with_graphs(root: Path, copy: Path, *names: str) -> Path:
    """A copy of the artifact that has only these graphs."""
    shutil.copytree(root, copy)
    manifest = read_manifest(copy)
    graphs = [g for g in manifest.graphs if g.name in names]
    write_manifest(copy, msgspec.structs.replace(manifest, graphs=graphs))
    return copy


@pytest.fixture
def own(sound: dict[str, Sound], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(sound[name].root, tmp_path / name))


@pytest.fixture
def own_prompts(sound: dict[str, Sound], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(sound[name].prompts, tmp_path / name))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    torch.set_num_threads(1)
    monkeypatch.setattr("msconv.verify.scenario.PROMPTS", (1, 5, 17))
    monkeypatch.setattr("msconv.verify.scenario.CHUNKS", (3, 16, 2))
    monkeypatch.setattr("msconv.verify.scenario.EVERY", (3, 1, 2))
    yield


def place_of_stored(root: Path, reference: Any) -> str:
    from msconv.verify.int8.stored import Check

    return Check(Artifact(root), reference.weights).run().place


def place_of_run(root: Path, reference: Any) -> str:
    """What a run alone names; "" if all agrees."""
    from msconv.verify.int8.run import compare_led
    from msconv.verify.lockstep import Lockstep
    from msconv.verify.scenario import play

    artifact = AnyGraphs(root)
    make = {"": lambda: Lockstep(artifact, TARGET)}
    has_decode = any(graph.name == "decode" for graph in artifact.graphs(TARGET))
    with pytest.MonkeyPatch.context() as patch:
        if not has_decode:  # prompts alone
            patch.setattr("msconv.verify.scenario.CHUNKS", (0, 0, 0))
            patch.setattr("msconv.verify.int8.run.play", lambda *given: islice(play(*given), 1))
        try:
            comparison, led = compare_led(make, {}, reference, 203, 128, steps=int(has_decode))
        except VerificationFailed as e:
            return e.message
    if comparison.ok and led.ok:
        return ""
    assert led.place or comparison.first
    return led.place or comparison.first


def test_at_least_twenty_kinds_of_fault() -> None:
    names = [f"{family} {fault.name}" for family, fault in (*STORED, *RUN)]
    assert len(set(names)) >= 38


def test_without_a_fault_nothing_is_named(sound: dict[str, Sound]) -> None:
    for one in sound.values():
        assert place_of_stored(one.root, one.reference) == ""
        assert place_of_run(one.root, one.reference) == ""


@pytest.mark.parametrize(("family", "fault"), STORED, ids=lambda v: v.name if isinstance(v, Fault) else v)
def test_a_fault_in_what_is_stored_is_named(
    own_prompts: Callable[[str], Path], sound: dict[str, Sound], family: str, fault: Fault
) -> None:
    root = own_prompts(family)
    fault.plant(root)
    assert re.search(fault.place, place_of_stored(root, sound[family].reference))


@pytest.mark.parametrize(("family", "fault"), RUN, ids=lambda v: v.name if isinstance(v, Fault) else v)
def test_a_fault_is_named_by_running(
    own_prompts: Callable[[str], Path], sound: dict[str, Sound], family: str, fault: Fault
) -> None:
    root = own_prompts(family)
    fault.plant(root)
    assert re.search(fault.place, place_of_run(root, sound[family].reference))


@pytest.mark.parametrize("graph", ["decode", "verify"])
def test_a_fault_of_one_graph_is_named(own: Callable[[str], Path], sound: dict[str, Sound], graph: str) -> None:
    root = own("dense")
    replace(FAULT, graph_names=(graph,)).plant(root)
    assert re.search(FAULT.place, place_of_run(root, sound["dense"].reference))


def verify(root: Path, *options: str) -> dict[str, Any]:
    """The object that `msconv verify --json` shows, with its exit code."""
    done = CliRunner().invoke(command, [str(root), "--target", TARGET, "--json", *options])
    return {"code": done.exit_code, **json.loads(done.stdout)}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DECODE_STEPS", "FEW_STEPS"):
        monkeypatch.setattr(f"msconv.verify.subject.{name}", 1)


def test_a_proof_says_what_was_compared_and_how_far_int8_drifts(
    own: Callable[[str], Path], few_steps: None
) -> None:
    root = own("dense")
    found = verify(root)
    assert found["code"] == 0
    assert found["ok"]
    int8 = found["int8"]
    assert (int8["codes_unexplained"], int8["tensors_compared"]) == (0, 56)
    assert int8["codes_led"] < 1e-4 * int8["codes_compared"]
    assert (int8["drift_text"], int8["drift_against"]) == ("random tokens", "the values of the source's codes")
    assert 0 < int8["drift_kl"] < 0.1
    assert 0.5 < int8["drift_argmax_agreement"] <= 1
    assert abs(int8["drift_perplexity"] / int8["drift_perplexity_unquantised"] - 1) < 0.1
    assert found["half_precision_max_abs_logit_error"] > 1e-3
    assert "half_precision_bound" not in found
    proof = read_manifest(root).proof_for(TARGET)
    assert proof is not None
    assert proof.mode == "float32, led"
    assert proof.settings["int8_drift_kl"] == int8["drift_kl"]
    assert "drift from the values of the source's codes, over 256 tokens of random tokens" in proof.reference


def test_a_bound_on_the_drift_is_kept(own: Callable[[str], Path], few_steps: None) -> None:
    root = own("dense")
    done = CliRunner().invoke(command, [str(root), "--target", TARGET, "--max-kl", "1e-7"])
    assert isinstance(done.exception, VerificationFailed)
    assert "from the values of the source's codes, --max-kl is 1.00e-07" in done.exception.message
    assert done.exception.hint.startswith("All else agrees: give a larger --max-kl")
    assert read_manifest(root).proof_for(TARGET) is None
    assert verify(root, "--max-kl", "1")["int8"]["drift_kl_bound"] == 1.0


def test_a_drift_that_is_not_finite_takes_the_proof_away(
    own: Callable[[str], Path], few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact that is proved stays readable: in its manifest there would be null."""
    from msconv.verify.int8.reference import QuantisedReference

    def overflown(self: QuantisedReference, sequences: list[list[int]]) -> Any:
        return [replace(t, logits=t.logits * np.float32("nan")) for t in self.traces(sequences)]

    root = own("dense")
    assert verify(root)["ok"]
    monkeypatch.setattr(QuantisedReference, "traces_of_values", overflown)
    found = verify(root)
    assert (found["code"], found["ok"]) == (VerificationFailed.exit_code, False)
    assert (found["int8"]["drift_kl"], found["int8"]["drift_perplexity_unquantised"]) == (None, None)
    assert found["place"].startswith(
        "the logits of the values of the source's codes are not finite, first of token 0"
    )
    assert read_manifest(root).proof_for(TARGET) is None


def test_a_fault_takes_the_proof_away_and_is_the_errors_place(own: Callable[[str], Path], few_steps: None) -> None:
    root = own("dense")
    (fault,) = (f for f in int8_faults.DENSE_WEIGHTS if f.name == "a scale is 1 % off")
    fault.plant(root)
    place = r"model\.layers\.1\.self_attn\.qkv_proj\.weight_scale of rank 0: 1 of 64 values differ .* at \[3, 0\]"
    with pytest.raises(VerificationFailed, match=place):
        prove(root, TARGET, None)
    assert read_manifest(root).proof_for(TARGET) is None


def test_first_layers_are_no_proof_of_the_whole(own: Callable[[str], Path], few_steps: None) -> None:
    root = own("dense")
    found = verify(root, "--layers", "1")
    assert found["code"] == 0
    assert found["layers"] == 1
    assert found["int8"]["codes_compared"] > 0
    assert "drift_kl" not in found["int8"]
    assert read_manifest(root).proof_for(TARGET) is None


def test_a_text_needs_a_tokenizer(own: Callable[[str], Path], tmp_path: Path, few_steps: None) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    with pytest.raises(UsageError, match="makes 0 tokens of it"):
        prove(own("dense"), TARGET, None, text=text)

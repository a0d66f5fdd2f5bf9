"""DeepSeek-V3's layer of multi-token prediction as a draft: compiled and proven; faults in it are found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.checkpoint.reference import configuration
from msconv.graph import decoder, mtp
from msconv.graph.spec import Local
from msconv.layout import model as layout
from msconv.layout.cuts import Mesh
from msconv.layout.model import Output, Sizes
from msconv.layout.rules import Rule
from msconv.steps.compile import compile_graphs
from msconv.steps.exporting import entry, made
from msconv.verify.prove import prove
from msconv.verify.result import Proof
from msconv_runtime import Session
from msconv_runtime.artifact import Artifact, replace_file
from msconv_runtime.roles import DRAFT_DECODE, DRAFT_EXTEND, HIDDEN, LOGITS, ROLES
from msconv_runtime.targets import TARGETS
from tests.conversions import convert
from tests.every import EVERY
from tests.moe_checkpoints import add_mtp, make_deepseek_v3
from tests.rehearsal.rehearsing import every_layout

TARGET = "ascend910b"
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 128,
}
DRAFTS = ("draft_extend", "draft_decode")

Construct = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(make_deepseek_v3(tmp_path_factory.mktemp("model") / "small", **SMALL))


@pytest.fixture(scope="module")
def sound(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "artifact"
    convert(model, root)
    compile_graphs(root, TARGET)
    return root


def test_a_draft_is_proven(sound: Path, model: Path, tmp_path: Path) -> None:
    """Its caches are its own layer's, embedding and head are the model's."""
    root = Path(shutil.copytree(sound, tmp_path / "copy"))
    proof = prove(root, TARGET, model)
    assert proof.ok, proof.place
    assert proof.comparison.undecided == 0
    phases = ("extend", "decode", "extend on a cached prefix", "decode after itself")
    for phase in phases:
        assert proof.comparison.by_phase[f"draft {phase}"] < 1e-4
        assert proof.comparison.by_phase[f"hidden states draft {phase}"] < 1e-4
    artifact = Artifact(root)
    graphs = {g.role: g for g in artifact.graphs(TARGET)}
    assert {r for r in graphs if ROLES[r].is_draft} == set(DRAFTS)
    for role in DRAFTS:
        assert [c.name for c in graphs[role].caches] == ["latent_cache.0"]
        assert [o.name for o in graphs[role].outputs] == [LOGITS, HIDDEN]
        shared = {p.name for p in graphs[role].reads} & {p.name for p in graphs["decode"].reads}
        assert shared == {"model.embed_tokens.weight", "lm_head.weight"}
    recorded = artifact.manifest.proof_for(TARGET)
    assert recorded is not None and "draft extend" in recorded.settings


@every_layout
@pytest.mark.parametrize("tp", [1, 2])
def test_on_a_cpu(model: Path, tmp_path: Path, tp: int) -> None:
    """MindSpore's own run for one rank, all graphs of both sets."""
    convert(model, tmp_path / "artifact", tp, ep=tp)
    compile_graphs(tmp_path / "artifact", "cpu")
    proof = prove(tmp_path / "artifact", "cpu", model)
    assert proof.ok, proof.place
    assert {"draft decode", "compiled draft decode after itself"} < proof.comparison.by_phase.keys()
    if tp == 1:
        _guesses(tmp_path / "artifact")


def _guesses(root: Path) -> None:
    """A draft beside its session: it goes on from the model's states, and then from its own."""
    session = Session(root)
    drafts = session.draft
    prompt = [5, 6, 7, 8]
    first = int(session.prefill([prompt]).argmax())
    drafts.begin(1)
    found = drafts.run(DRAFT_EXTEND, [[*prompt[1:], first]], session.hidden)
    assert found[LOGITS].shape == (1, 203) and found[HIDDEN].shape == (4, 64)
    again = drafts.run(DRAFT_DECODE, [[int(found[LOGITS].argmax())]], found[HIDDEN][-1:])
    assert again[HIDDEN].shape == (1, 64) and np.isfinite(again[LOGITS]).all()


@every_layout
def test_in_int8(model: Path, tmp_path: Path) -> None:
    """The draft's graphs are led as the model's are; what is left of its logits' difference is float32's."""
    convert(model, tmp_path / "artifact", 2, ep=2, quant="w8a8")
    compile_graphs(tmp_path / "artifact", TARGET)
    proof = prove(tmp_path / "artifact", TARGET, model)
    assert proof.ok, proof.place
    assert proof.led is not None
    assert proof.led.verdicts["draft"].ok
    assert proof.led.verdicts["draft"].compared > 0
    assert proof.comparison.by_phase["draft extend"] < 1e-4
    assert proof.comparison.by_phase["draft decode after itself"] < 1e-4
    assert {"model.layers.2.self_attn", "model.layers.2.mlp"} <= proof.led.groups.keys()
    assert 0 < proof.led.drafts[""].kl < 1e-3  # where each rounds by itself
    types = {t.name: t.dtype for t in Artifact(tmp_path / "artifact").weights.tensors}
    assert types["model.layers.2.mlp.experts.gate_up_proj.weight"] == "int8"
    assert types["model.layers.2.eh_proj.weight"] == "float32"


# Faults.  Each graph or conversion is what a plausible slip would make of it.


def enorm_and_hnorm_exchanged(self: Any, *inputs: Any) -> Any:
    step = self.begin(inputs)
    embedded, before = self.hnorm(self.embed(inputs[0])), self.enorm(inputs[self.num_inputs])
    x = self.eh_proj(mtp.functional.concat((embedded, before), -1))
    found = self.layer(self.first_norm(x), x, step, inputs[self.num_inputs + 1 :])
    return self.logits(self.last(found[0], step)), self.hidden(found[0])


def hidden_states_first(self: Any, *inputs: Any) -> Any:
    step = self.begin(inputs)
    embedded, before = self.enorm(self.embed(inputs[0])), self.hnorm(inputs[self.num_inputs])
    x = self.eh_proj(mtp.functional.concat((before, embedded), -1))
    found = self.layer(self.first_norm(x), x, step, inputs[self.num_inputs + 1 :])
    return self.logits(self.last(found[0], step)), self.hidden(found[0])


def states_before_the_norm(self: Any, *inputs: Any) -> Any:
    step = self.begin(inputs)
    embedded, before = self.enorm(self.embed(inputs[0])), self.hnorm(inputs[self.num_inputs])
    x = self.eh_proj(mtp.functional.concat((embedded, before), -1))
    h, x = self.layer(self.first_norm(x), x, step, inputs[self.num_inputs + 1 :])
    return self.logits(self.last(h, step)), self.hidden(x)


def model_gives_states_before_the_norm(self: Any, *inputs: Any) -> Any:
    step = self.begin(inputs)
    x = self.embed(inputs[0])
    h = self.first_norm(x)
    for i in range(self.num_layers):
        first = self.num_inputs + self.num_caches * i
        h, x = self.layers[i](h, x, step, inputs[first : first + self.num_caches])
    return self.results[0](self.last(h, step)), self.results[1](x)


FAULTS: dict[str, tuple[type, Construct, tuple[str, ...], str]] = {
    "enorm and hnorm exchanged": (mtp.NextToken, enorm_and_hnorm_exchanged, DRAFTS, "draft extend"),
    "concatenated the other way": (mtp.NextToken, hidden_states_first, DRAFTS, "draft extend"),
    "states before the norm": (mtp.NextToken, states_before_the_norm, DRAFTS[1:], "draft decode"),
    "the model's states before the norm": (
        decoder.DecoderWithDraft,
        model_gives_states_before_the_norm,
        ("prefill",),
        "hidden states, seen in prefill",
    ),
}
QUICK = ("enorm and hnorm exchanged",)


def planted(sound: Path, root: Path, roles: tuple[str, ...]) -> Path:
    """The artifact with graphs of these roles as the code makes them now."""
    shutil.copytree(sound, root)
    artifact = Artifact(root)
    config, types = configuration(artifact), {t.name: t.dtype for t in artifact.weights.tensors}
    graphs = []
    for graph in artifact.manifest.graphs:
        if graph.role in roles:
            local = Local(config, Mesh(1), TARGETS[TARGET], ROLES[graph.role], "", types, artifact.manifest.draft)
            done = made(local)
            graph = entry(local, done)
            replace_file(root / graph.path, done.exported.proto)
        graphs.append(graph)
    artifact.changed(graphs=graphs)
    return root


def place(proof: Proof) -> str:
    assert not proof.ok
    return proof.place


@pytest.mark.parametrize("fault", FAULTS if EVERY else QUICK)
def test_a_fault_is_found(
    fault: str, sound: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, construct, roles, seen = FAULTS[fault]
    monkeypatch.setattr(network, "construct", construct)
    assert seen in place(prove(planted(sound, tmp_path / "artifact", roles), TARGET, model))


def test_rotated_rows_left_in_pairs_are_found(
    sound: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the draft's layer alone: the model's own are in halves, as the graphs rotate them."""
    root, output = tmp_path / "artifact", layout._output

    def unsorted(rule: Rule, sizes: Sizes, layer: int | None) -> Output:
        if layer in sizes.draft_layers and "q_b_proj" in rule.dst:
            parts = tuple(replace(part, cut=replace(part.cut, pairs="")) for part in rule.parts)
            rule = replace(rule, parts=parts)
        return output(rule, sizes, layer)

    monkeypatch.setattr(layout, "_output", unsorted)
    convert(model, root)
    shutil.copytree(sound / "graphs", root / "graphs")
    Artifact(root).changed(graphs=Artifact(sound).manifest.graphs)
    assert "draft extend" in place(prove(root, TARGET, model))

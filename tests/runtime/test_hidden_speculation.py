"""Drafts that read hidden states against the artifact that is served: what does not fit is said at the start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from msgspec.structs import replace

from msconv.steps.compile import compile_graphs
from msconv.steps.drafts import expect_draft
from msconv_runtime.artifact import Artifact, Draft, read_manifest
from msconv_runtime.doctor import Machine, examine
from msconv_runtime.draft_kinds import DRAFT_KINDS, LAYER_IDS
from msconv_runtime.errors import CheckpointError, UsageError
from msconv_runtime.roles import DRAFT_EXTEND
from msconv_runtime.sglang.speculation import hidden_problems, speculation_problems
from msconv_runtime.targets import CPU
from tests.conversions import convert
from tests.eagle3_checkpoints import make_eagle3

IDS = {"eagle_config": {LAYER_IDS: [0, 1, 2]}}  # of a model of 4 layers
EAGLE3 = ("--speculative-algorithm", "EAGLE3")


def make_draft(root: Path, **config: object) -> Path:
    make_eagle3(root / "checkpoint", **{**IDS, **config})
    convert(root / "checkpoint", root / "draft")
    compile_graphs(root / "draft", "cpu", lambda line: None)
    return root / "draft"


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(tmp_path_factory.mktemp("draft"))


def giving(root: Path, layers: list[int] | None) -> Artifact:
    """The artifact as if its graphs gave hidden states of these layers; of none, for a layer of its own."""
    found = None if layers is None else Draft("eagle3" if layers else "mtp", layers)
    return Artifact(root, replace(read_manifest(root), draft=found))


def problems(artifact: Artifact, algorithm: str, draft: Path | None = None, **more: str) -> list[str]:
    given = {"--speculative-algorithm": algorithm}
    given |= {"--speculative-draft-model-path": str(draft)} if draft else {}
    given |= {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    return speculation_problems(artifact, CPU, given)


def test_the_layers_are_those_of_sglang() -> None:
    assert DRAFT_KINDS["eagle3"].captured(36, None) == [2, 18, 33]
    assert DRAFT_KINDS["eagle3"].captured(36, [1, 17, 32]) == [2, 18, 33]


def test_a_draft_that_fits(compiled: Path, draft: Path) -> None:
    assert problems(giving(compiled, [1, 2, 3]), "EAGLE3", draft) == []
    counts = {"speculative_num_steps": "3", "speculative_eagle_topk": "4", "speculative_num_draft_tokens": "8"}
    (line,) = problems(giving(compiled, [1, 2, 3]), "eagle3", draft, **counts)
    assert "Give --page-size 1" in line


def test_hidden_states_are_given_where_a_layer_of_its_own_drafts(compiled: Path) -> None:
    """And not by other graphs, nor by those that a draft of EAGLE3 reads."""
    flag = {"--enable-return-hidden-states": ""}
    for artifact in (Artifact(compiled), giving(compiled, [1, 2, 3])):
        (line,) = hidden_problems(artifact, CPU, flag)
        assert "Leave the flag out" in line
        assert hidden_problems(artifact, CPU, {}) == []
    own = giving(compiled, [])
    graphs = [*own.manifest.graphs, replace(own.manifest.graphs[0], role=DRAFT_EXTEND.name)]
    drafting = Artifact(own.root, replace(own.manifest, graphs=graphs))
    assert hidden_problems(drafting, CPU, flag) == []
    (line,) = hidden_problems(drafting, CPU, {"--return-hidden-states-mode": "last"})
    assert "Give --return-hidden-states-mode full" in line


@pytest.mark.parametrize(("layers", "told"), [(None, "no hidden states"), ([0, 2, 3], "layers [0, 2, 3]")])
def test_graphs_that_do_not_give_what_it_reads(
    compiled: Path, draft: Path, layers: list[int] | None, told: str
) -> None:
    (line,) = problems(giving(compiled, layers), "EAGLE3", draft)
    assert "reads the layers [1, 2, 3]" in line
    assert told in line
    assert f"`msconv compile {compiled} --target cpu --draft {draft}`" in line


def test_a_model_with_a_layer_that_drafts(compiled: Path, draft: Path) -> None:
    """Its graphs cannot give what another draft reads: `compile --draft` would be refused."""
    (line,) = problems(giving(compiled, []), "EAGLE3", draft)
    assert "convert the model with --no-drafts" in line


def test_a_draft_of_another_hidden_size(compiled: Path, tmp_path: Path) -> None:
    other = make_draft(tmp_path, hidden_size=64, head_dim=16)
    (line,) = problems(giving(compiled, [1, 2, 3]), "EAGLE3", other)
    assert "reads hidden states of 64 values, its target has 128" in line
    with pytest.raises(UsageError, match="a hidden size of 64, not of 128"):
        expect_draft(compiled, str(other), "huggingface")


def test_a_draft_of_another_vocabulary_or_layout(compiled: Path, draft: Path) -> None:
    target = giving(compiled, [1, 2, 3])
    changed = replace(target.manifest.parallel, tp=2)
    found = problems(Artifact(compiled, replace(target.manifest, parallel=changed)), "EAGLE3", draft)
    assert any("is for tp 1, ep 1, its target for tp 2" in line for line in found)
    make_eagle3(draft.parent / "other", vocab_size=1001, **IDS)
    with pytest.raises(UsageError, match="a vocabulary of 1001, not of 1003"):
        expect_draft(compiled, str(draft.parent / "other"), "huggingface")


def test_drafts_of_another_kind(compiled: Path, draft: Path) -> None:
    target = giving(compiled, [1, 2, 3])
    (line,) = problems(target, "EAGLE3", compiled)
    assert "is a model by itself" in line
    (line,) = problems(target, "STANDALONE", draft)
    assert "Give --speculative-algorithm EAGLE3" in line
    found = problems(target, "NEXTN", draft)
    assert "the artifact drafts by itself" in found[0]
    assert "has no graphs that draft" in found[1]
    with pytest.raises(UsageError, match="is a model by itself"):
        expect_draft(compiled, str(compiled), "huggingface")


def test_a_kind_may_share_an_algorithm_or_have_one_of_its_own(
    compiled: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAGLE without a path is the model's own layer, whoever else drafts by it."""
    target, kind = giving(compiled, [1, 2, 3]), DRAFT_KINDS["eagle3"]
    monkeypatch.setitem(DRAFT_KINDS, "eagle3", dataclasses.replace(kind, algorithms=("OTHER",)))
    (line,) = problems(target, "EAGLE3", draft)
    assert "is a draft of EAGLE3.  Give --speculative-algorithm OTHER" in line
    monkeypatch.setitem(DRAFT_KINDS, "eagle3", dataclasses.replace(kind, algorithms=("EAGLE",)))
    assert problems(target, "EAGLE", draft) == []
    assert "its layer for multi-token prediction" in problems(target, "EAGLE")[0]


def test_a_draft_is_not_served_by_itself(draft: Path) -> None:
    findings = {f.name: f for f in examine(Machine(), draft).findings}
    assert findings["graphs cpu"].state == "missing"
    assert "answers nobody by itself" in findings["graphs cpu"].needed


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_hidden_layers": 2}, "a draft of one layer"),
        ({"tie_word_embeddings": True}, "a head of its own"),
        ({"target_hidden_size": 256}, "as wide as its target"),
        ({"norm_before_fc": True}, "a variant of EAGLE3"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "without residual streams"),
        ({"eagle_config": {LAYER_IDS: [1, "x"]}}, "numbers of layers"),
        ({"num_aux_hidden_states": 4}, "names 3 layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_draft_that_no_graph_computes_is_refused(tmp_path: Path, config: dict[str, object], told: str) -> None:
    make_eagle3(tmp_path / "draft", **{**IDS, **config})
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "draft", tmp_path / "artifact")

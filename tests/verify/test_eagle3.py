"""A draft of EAGLE3: converted, compiled, proved; faults are found; and what SGLang's slot makes of its graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from msconv.steps.compile import compile_graphs
from msconv.verify.drafts import Drawn
from msconv.verify.eagle3 import Eagle3Reference
from msconv.verify.prove import prove
from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.consistency import contradiction
from msconv_runtime.graphs import Graphs
from msconv_runtime.paging import Sequences
from msconv_runtime.roles import DRAFT_DECODE, DRAFT_EXTEND, HIDDEN, LOGITS, Role
from msconv_runtime.sglang import drafts
from tests.conversions import convert
from tests.eagle3_checkpoints import make_eagle3
from tests.rehearsal.rehearsing import every_layout
from tests.verify.faults import exchange, exchange_rows
from tests.verify.planting import Ranks, edit_weights

TARGET = "ascend910b"
SLOTS = 4096  # of the caches
WIDTH = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_eagle3(tmp_path_factory.mktemp("eagle3") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    """For two ranks: 301 tokens do not divide."""
    root = checkpoint.with_name("artifact")
    convert(checkpoint, root, 2)
    compile_graphs(root, TARGET, lambda line: None)
    return root


@pytest.mark.parametrize("target", [TARGET, pytest.param("cpu", marks=every_layout)])
def test_it_is_proved_and_keeps_what_it_draws_on(artifact: Path, target: str) -> None:
    if target != TARGET:
        compile_graphs(artifact, target, lambda line: None)
    proof = prove(artifact, target, None)
    assert proof.ok, proof.place
    assert (proof.missing, proof.unused) == ([], [])
    assert set(proof.comparison.by_phase) == {
        "draft",
        "draft, further steps",
        "draft on a cached prefix",
        "draft on a cached prefix, further steps",
    }
    found = Artifact(artifact)
    assert found.is_draft
    model = msgspec.structs.replace(found.manifest.model, family="qwen3")
    assert "no kind of draft" in contradiction(msgspec.structs.replace(found.manifest, model=model))
    assert {t.name: t.dtype for t in found.weights.tensors}["d2t"] == "int32"
    assert not any("embed_tokens" in t.name for t in found.weights.tensors)
    read = {p.name for g in found.graphs(target) for p in g.reads}
    assert {"target.model.embed_tokens.weight", "target.vocab_start"} < read


def streams_exchanged(ranks: Ranks) -> None:
    for values in ranks:
        first, second, third = np.split(values["fc.weight"], 3, 1)
        values["fc.weight"] = np.concatenate((second, first, third), 1)


FAULTS: dict[str, Callable[[Ranks], None]] = {
    "streams": streams_exchanged,
    "norms before attention": exchange("midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"),
    "last norm": exchange("norm.weight", "midlayer.post_attention_layernorm.weight"),
    "tokens": exchange_rows("lm_head.weight", slice(0, 1), slice(1, 2)),
}


@pytest.mark.parametrize(
    "change", [pytest.param(f, id=name, marks=[every_layout] * (name != "streams")) for name, f in FAULTS.items()]
)
def test_a_fault_is_found(artifact: Path, tmp_path: Path, change: Callable[[Ranks], None]) -> None:
    root = shutil.copytree(artifact, tmp_path / "artifact")
    edit_weights(root, change)
    proof = prove(root, TARGET, None)
    assert not proof.ok
    assert proof.place


def test_the_slot_gives_sglang_rows_of_what_was_accepted(checkpoint: Path, tmp_path: Path) -> None:
    """A prompt, a step of its own, and a verification of which 1 and 3 tokens were accepted."""
    convert(checkpoint, tmp_path / "artifact", 1)
    compile_graphs(tmp_path / "artifact", "cpu", lambda line: None)
    draft, rng = Artifact(tmp_path / "artifact"), np.random.default_rng(3)
    target, reference = Drawn(draft, 1003, WIDTH), Eagle3Reference(checkpoint)
    graphs = Graphs(draft, "cpu", model=target)
    caches = blank(graphs)
    sequences, seen = Sequences(2, graphs.page), [([], []), ([], [])]

    def step(role: Role, counts: list[int], width: int, accepted: list[int] | None = None) -> Any:
        new = [[int(t) for t in rng.choice(target.tokens, n)] for n in counts]
        given = rng.normal(0, 1, (sum(counts), width)).astype(np.float32)
        before = list(sequences.lengths)
        batch = sequences.advance(new)
        kept = accepted or counts
        rows = np.split(given, np.cumsum(counts)[:-1])
        for (tokens, states), ids, vectors, n in zip(seen, new, rows, kept, strict=True):
            tokens += ids[:n]
            states += list(vectors[:n])
        found = drafts.run(graphs, role, batch, caches, given, None if accepted is None else np.array(accepted))
        if accepted:
            sequences.lengths = [b + n for b, n in zip(before, accepted, strict=True)]  # and keep their slots
        return found

    for role, counts, width, accepted in (
        (DRAFT_EXTEND, [5, 20], 3 * WIDTH, None),
        (DRAFT_DECODE, [1, 1], WIDTH, None),
        (DRAFT_EXTEND, [4, 4], 3 * WIDTH, [1, 3]),
        (DRAFT_DECODE, [1, 1], WIDTH, None),
    ):
        found = step(role, counts, width, accepted)
        places = [0, 1] if accepted is None else [4 * i + n - 1 for i, n in enumerate(accepted)]
        assert len(found[LOGITS]) == (2 if accepted is None else 8)
        for place, (tokens, states) in zip(places, seen, strict=True):
            logits, own = reference.run(target.table[tokens], states)
            assert np.abs(found[LOGITS][place] - logits[-1]).max() < 1e-4, role.name
            assert np.abs(found[HIDDEN][place] - own[-1]).max() < 1e-4, role.name


def blank(graphs: Graphs) -> list[Any]:
    from mindspore import Tensor

    shapes = [(SLOTS, graphs.page, *(n or 1 for n in cache.shape[2:])) for cache in graphs.caches]
    return [Tensor(np.zeros(shape, np.float32)) for shape in shapes]

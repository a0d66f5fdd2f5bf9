"""What a proof's tokens do not touch is compared with the source's bit for bit: rows of the embedding, routers,
experts that no token chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msconv.checkpoint.directory import open_checkpoint
from msconv.checkpoint.reference import configuration
from msconv.steps.compile import compile_graphs
from msconv.verify.compare import chosen_judged
from msconv.verify.prove import prove
from msconv.verify.reference import Trace
from msconv.verify.source_weights import SourceWeights
from msconv.verify.stored import EMBEDDING, Untouched
from msconv_runtime.artifact import Artifact
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.moe_checkpoints import make_deepseek_v3, make_qwen3_moe, quantise_fp8
from tests.verify.planting import edit_weights

VOCAB = 20_000
Ranks = list[dict[str, np.ndarray]]
EXPERTS = "model.layers.2.mlp.experts."


def untouched(model: Path, root: Path, chosen: dict[int, frozenset[int]] | None = None) -> str:
    artifact = Artifact(root)
    weights = SourceWeights(open_checkpoint(model), [artifact.manifest])
    return Untouched(artifact, weights, configuration(artifact)).run(chosen or {}).place


@pytest.mark.parametrize(("tp", "dtype", "stored"), [(1, "bfloat16", "bfloat16"), (4, "float32", "bfloat16")])
def test_every_row_of_the_embedding_is_compared(tmp_path: Path, tp: int, dtype: str, stored: str) -> None:
    sizes = {"vocab_size": 1003, "hidden_size": 32, "num_hidden_layers": 1}
    model = make_qwen3(tmp_path / "model", dtype=dtype, **sizes)
    convert(model, tmp_path / "out", tp, dtype=stored)
    assert not untouched(model, tmp_path / "out")
    rank, row = (tp - 1, 249) if tp > 1 else (0, 1002)

    def change(ranks: Ranks) -> None:
        ranks[rank][EMBEDDING][row, 3] ^= 1

    edit_weights(tmp_path / "out", change)
    found = untouched(model, tmp_path / "out")
    assert found.startswith(f"{EMBEDDING} of rank {rank}: 1 of ") and f"the first at [{row}, 3]" in found


def test_a_proof_finds_rows_that_it_did_not_look_up(tmp_path: Path) -> None:
    model = make_qwen3(tmp_path / "model", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1)
    root = tmp_path / "out"
    convert(model, root)
    compile_graphs(root, "cpu")
    assert prove(root, "cpu", model).ok
    edit_weights(root, lambda ranks: ranks[0][EMBEDDING][VOCAB - 3 : VOCAB].fill(7))
    proof = prove(root, "cpu", model)
    assert not proof.ok and proof.comparison.max_abs_logit_error < 1e-4
    assert f"{EMBEDDING} of rank 0" in proof.comparison.first
    assert not Artifact(root).manifest.verified


@pytest.mark.parametrize(("family", "tp", "ep"), [("qwen3_moe", 4, 2), ("deepseek_v3", 1, 1), ("fp8", 4, 2)])
def test_experts_that_no_token_chose_and_routers_are_compared(
    tmp_path: Path, family: str, tp: int, ep: int
) -> None:
    if family == "qwen3_moe":
        model = make_qwen3_moe(tmp_path / "model")
    else:
        model = make_deepseek_v3(tmp_path / "model", dtype="bfloat16")
    if family == "fp8":
        model = quantise_fp8(model, tmp_path / "fp8")
    root = tmp_path / "out"
    convert(model, root, tp, ep=ep)
    all_but_one = {layer: frozenset(range(16)) - {13} for layer in range(4)}
    assert not untouched(model, root) and not untouched(model, root, all_but_one)
    local = 13 % (16 // ep)
    faults: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
        f"{EXPERTS}gate_up_proj.weight": lambda rank: flip(rank[f"{EXPERTS}gate_up_proj.weight"][local, 5, 7:8]),
        f"{EXPERTS}down_proj.weight": lambda rank: flip(rank[f"{EXPERTS}down_proj.weight"][local, 7, 5:6]),
        "model.layers.2.mlp.gate.weight": lambda rank: flip(rank["model.layers.2.mlp.gate.weight"][1, 5:6]),
    }
    for name, fault in faults.items():
        edit_weights(root, lambda ranks, fault=fault: fault(ranks[-1]))
        found = untouched(model, root, all_but_one)
        assert found.startswith(f"{name} of rank {tp - 1}") and " 1 of " in found
        if EXPERTS in name:
            assert not untouched(model, root, {layer: frozenset(range(16)) for layer in range(4)})
        edit_weights(root, lambda ranks, fault=fault: fault(ranks[-1]))
    assert not untouched(model, root, all_but_one)


def flip(place: np.ndarray) -> None:
    place.view(np.uint16 if place.itemsize == 2 else np.uint32)[:] ^= 1


def test_only_choices_that_were_judged_count() -> None:
    closest = np.array([1, 1, 0, 1], np.float32)
    chosen = {"model.layers.3.mlp.experts": np.array([[0, 1], [1, 2], [3, 4], [5, 6]])}
    traces = [Trace(np.zeros((4, 1), np.float32), {}, closest, chosen=chosen)]
    assert chosen_judged(traces) == {3: frozenset({0, 1, 2})}

"""A checkpoint's layer of multi-token prediction: taken, left out, absent, half there, or not what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msconv.checkpoint.drafts import with_draft
from msconv.location import LocalDirectory
from msconv.steps import reshard as resharding
from msconv.steps.conversion import run
from msconv.steps.estimate import estimate
from msconv_runtime.artifact import Artifact, Draft
from msconv_runtime.errors import CheckpointError
from tests.checkpoints import Stored, edit_json, read_checkpoint, read_rank
from tests.conversions import convert, prepare
from tests.moe_checkpoints import add_mtp, dequantise, quantise_fp8
from tests.stream.moe_models import BLOCK, DEEPSEEK, Tensors, change, random_checkpoint, weights_of

LAYER = "model.layers.2."
OWN = ("enorm", "hnorm", "eh_proj", "shared_head.norm")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return add_mtp(quantise_fp8(random_checkpoint(root / "plain", DEEPSEEK), root / "fp8", BLOCK, shards=3))


@pytest.fixture
def own(fp8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp8, tmp_path / "own"))


def without(words: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(LAYER) and words in n]:
            del tensors[name]

    return remove


def test_it_is_taken(fp8: Path, tmp_path: Path) -> None:
    """Its own tensors whole on every rank, the layer cut as any other, FP8 decoded; copies are left out."""
    convert(fp8, tmp_path / "out", 4, ep=2)
    artifact, source = Artifact(tmp_path / "out"), read_checkpoint(fp8)
    assert artifact.manifest.draft == Draft("mtp")
    assert {d.name: d.reason for d in artifact.weights.dropped} == {
        f"{LAYER}embed_tokens.weight": "the draft's copy of model.embed_tokens.weight",
        f"{LAYER}shared_head.head.weight": "the draft's copy of lm_head.weight",
    }
    names = [t.name for t in artifact.weights.tensors]
    ours = {n.removeprefix(LAYER) for n in names if n.startswith(LAYER)}
    assert ours == {n.replace("model.layers.1.", "") for n in names if n.startswith("model.layers.1.")} | {
        f"{name}.weight" for name in OWN
    }
    for rank in range(4):
        tensors = read_rank(artifact.root, rank)
        for name in OWN:
            assert np.array_equal(tensors[f"{LAYER}{name}.weight"].bits, source[f"{LAYER}{name}.weight"].bits)
    gate = f"{LAYER}mlp.shared_experts.gate_proj.weight"
    values = dequantise(source[gate].bits, source[gate + "_scale_inv"].bits, BLOCK)
    found = read_rank(artifact.root, 0)[f"{LAYER}mlp.shared_experts.gate_up_proj.weight"].bits
    rows = len(found) // 2
    assert np.array_equal(found[:rows], (values[:rows].view(np.uint32) + 0x8000 >> 16).astype(np.uint16))


def test_the_model_itself_is_the_same_without(fp8: Path, tmp_path: Path) -> None:
    convert(fp8, tmp_path / "with", 2)
    convert(fp8, tmp_path / "without", 2, drafts=False)
    whole, bare = (read_rank(tmp_path / name, 1) for name in ("with", "without"))
    assert bare.keys() == {n for n in whole if not n.startswith(LAYER)}
    assert all(np.array_equal(bare[n].bits, whole[n].bits) for n in bare)
    assert Artifact(tmp_path / "without").manifest.draft is None


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 4)])
def test_resharded(fp8: Path, tp: int, ep: int, tmp_path: Path) -> None:
    convert(fp8, tmp_path / "from", 2, ep=2)
    run(resharding.prepare(tmp_path / "from", tp, ep, tmp_path / "to"))
    convert(fp8, tmp_path / "direct", tp, ep=ep)
    assert weights_of(tmp_path / "to") == weights_of(tmp_path / "direct")
    assert Artifact(tmp_path / "to").manifest.draft == Draft("mtp")


def test_a_promise_without_the_layer_is_said(own: Path, tmp_path: Path) -> None:
    change(own, without(""))
    conversion = prepare(own, 2, output=tmp_path / "out")
    assert any("num_nextn_predict_layers 1" in note and "no draft of its own" in note for note in conversion.notes)
    run(conversion)
    assert Artifact(tmp_path / "out").manifest.draft is None
    others = prepare(own, 2, output=tmp_path / "other", drafts=False).notes
    assert not any("num_nextn" in note for note in others)


@pytest.mark.parametrize(
    ("words", "count", "example"),
    [("eh_proj", 1, "eh_proj"), ("self_attn", 7, "self_attn"), ("experts.3.", 3, "experts.3.")],
)
def test_half_of_it_is_refused(own: Path, words: str, count: int, example: str, tmp_path: Path) -> None:
    change(own, without(words))
    with pytest.raises(CheckpointError) as caught:
        prepare(own, 2, output=tmp_path / "out")
    assert "half of the layer of multi-token prediction is there" in caught.value.message
    assert f"lacks {count}" in caught.value.message and example in caught.value.message
    assert "--no-drafts" in caught.value.hint
    convert(own, tmp_path / "out", 2, drafts=False)


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_is_none_is_refused(own: Path, name: str, tmp_path: Path) -> None:
    """A server gives the draft the model's embedding and head, whatever the checkpoint has."""

    def other(tensors: Tensors) -> None:
        stored = tensors[f"{LAYER}{name}.weight"]
        bits = stored.bits.copy()
        bits[-1, -1] ^= 1
        tensors[f"{LAYER}{name}.weight"] = Stored(stored.code, bits)

    change(own, other)
    with pytest.raises(CheckpointError, match=f"{name}.weight: differs from") as caught:
        convert(own, tmp_path / "out", 2)
    assert "--no-drafts --force" in caught.value.hint
    convert(own, tmp_path / "out", 2, force=True, drafts=False)


def test_copies_may_be_absent(own: Path, fp8: Path, tmp_path: Path) -> None:
    change(own, without("embed_tokens"))
    change(own, without("shared_head.head"))
    convert(own, tmp_path / "out", 2)
    convert(fp8, tmp_path / "whole", 2)
    assert weights_of(tmp_path / "out").digest == weights_of(tmp_path / "whole").digest


def test_further_layers_are_left_out(own: Path, tmp_path: Path) -> None:
    """Servers use the first one alone."""

    def doubled(tensors: Tensors) -> None:
        tensors |= {n.replace(LAYER, "model.layers.3."): t for n, t in tensors.items() if n.startswith(LAYER)}

    change(own, doubled)
    edit_json(own / "config.json", num_nextn_predict_layers=2)
    convert(own, tmp_path / "out", 2)
    names = {t.name for t in Artifact(tmp_path / "out").weights.tensors}
    assert any(n.startswith(LAYER) for n in names) and not any(n.startswith("model.layers.3.") for n in names)


def test_plan_knows_it(fp8: Path, tmp_path: Path) -> None:
    """With weights and without; how much of it is the draft's."""
    for path in (fp8, tmp_path / "configuration"):
        if not path.exists():
            path.mkdir()
            shutil.copy(fp8 / "config.json", path)
        found, bare = (
            estimate(LocalDirectory(path), 2, 2, "bfloat16", tmp_path / "out", 1, None, 8, 1, None, drafts=drafts)
            for drafts in (True, False)
        )
        assert found.plan.parameters == bare.plan.parameters
        grown = found.plan.rank_bytes - bare.plan.rank_bytes
        assert 0 <= grown - found.plan.draft_bytes < 8192 and found.plan.draft_bytes > 10_000  # headers besides
        config = json.loads((fp8 / "config.json").read_text())
        own = (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 2
        assert found.device.kv_bytes_per_token - found.model_kv_bytes_per_token == own
        assert bare.device.kv_bytes_per_token == found.model_kv_bytes_per_token
    taken = with_draft(LocalDirectory(fp8).open_checkpoint(()), True)
    assert taken.config.drafts == 1

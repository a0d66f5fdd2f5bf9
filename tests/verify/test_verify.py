"""Proofs: given for what computes as its source does, and for nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from msconv.steps.compile import compile_graphs
from msconv.steps.conversion import run
from msconv.verify.prove import prove
from msconv.verify.reference import source_of
from msconv.verify.result import Proof
from msconv_runtime.artifact import digest_bytes, digest_of, read_manifest, write_manifest
from msconv_runtime.errors import ArtifactError, UsageError, VerificationFailed
from tests.checkpoints import Bits, read_safetensors, read_tree
from tests.commands import run_msconv
from tests.conftest import Checkpoints
from tests.conversions import prepare
from tests.every import one_of_many
from tests.warm import run_warm

RANK_0 = "weights/model-rank-0-part-0.safetensors"


def build(model: Path, root: Path, tp: int = 1, **options: Any) -> Path:
    run(prepare(model, tp, output=root, **options))
    compile_graphs(root, "cpu")
    return root


def proven(root: Path) -> Any:
    """What `inspect --json` says of the CPU's graphs."""
    done = run_msconv("inspect", root, "--json")
    assert done.code in (0, 1)  # 1: a graph is not what the manifest says
    return done.json["proven"]["cpu"]


def refused(root: Path, reference: Path | None = None) -> VerificationFailed:
    with pytest.raises(VerificationFailed) as caught:
        prove(root, "cpu", reference)
    return caught.value


def change_values(root: Path, change: Callable[[dict[str, Bits]], None], seal: bool) -> None:
    """Change stored values in place; `seal`: with a manifest that agrees, as a faulty converter would."""
    path = root / RANK_0
    values = {name: t.bits.copy() for name, t in read_safetensors(path).items()}
    change(values)
    manifest = read_manifest(root)
    assert manifest.weights is not None
    data = bytearray(path.read_bytes())
    entries = []
    for entry in manifest.weights.tensors:
        raw = values[entry.name].tobytes()
        assert len(raw) == entry.nbytes
        data[entry.begin : entry.begin + entry.nbytes] = raw
        ends = np.cumsum(entry.parts)
        parts = [raw[end - size : end] for end, size in zip(ends, entry.parts, strict=True)]
        entries.append(msgspec.structs.replace(entry, digests=[digest_of(digest_bytes(part) for part in parts)]))
    path.write_bytes(data)
    if seal:
        header = bytes(data[: entries[0].begin])
        (file,) = manifest.weights.files
        digest = digest_of([digest_bytes(header), *(e.digests[0] for e in entries)])
        file = msgspec.structs.replace(file, digest=digest)
        weights = msgspec.structs.replace(
            manifest.weights, files=[file], tensors=entries, digest=digest_of([digest])
        )
        write_manifest(root, msgspec.structs.replace(manifest, weights=weights))


def layer(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}.weight"


def flip_low_bit(values: dict[str, Bits]) -> None:
    values[layer(2, "self_attn.qkv_proj")][5, 7] ^= 1


def flip_exponent_bit(values: dict[str, Bits]) -> None:
    values[layer(2, "self_attn.qkv_proj")][5, 7] ^= 1 << 27


def swap(a: str, b: str) -> Callable[[dict[str, Bits]], None]:
    def change(values: dict[str, Bits]) -> None:
        values[a], values[b] = values[b], values[a]

    return change


def swap_halves(name: str) -> Callable[[dict[str, Bits]], None]:
    def change(values: dict[str, Bits]) -> None:
        middle = len(values[name]) // 2
        values[name] = np.concatenate([values[name][middle:], values[name][:middle]])

    return change


def swap_keys_and_values(values: dict[str, Bits]) -> None:
    qkv = values[layer(1, "self_attn.qkv_proj")]
    values[layer(1, "self_attn.qkv_proj")] = np.concatenate([qkv[:256], qkv[320:], qkv[256:320]])


def shift_vocabulary(values: dict[str, Bits]) -> None:
    values["model.embed_tokens.weight"] = np.roll(values["model.embed_tokens.weight"], 1, axis=0)


def not_a_number(values: dict[str, Bits]) -> None:
    values["model.norm.weight"][3] = 0x7FC00000


CHANGES: dict[str, Callable[[dict[str, Bits]], None]] = {
    "an exponent bit": flip_exponent_bit,
    "q_norm and k_norm": swap(layer(1, "self_attn.q_norm"), layer(1, "self_attn.k_norm")),
    "the norms of a layer": swap(layer(0, "input_layernorm"), layer(0, "post_attention_layernorm")),
    "the same tensor of two layers": swap(layer(1, "self_attn.o_proj"), layer(2, "self_attn.o_proj")),
    "embedding and head": swap("model.embed_tokens.weight", "lm_head.weight"),
    "gate and up": swap_halves(layer(3, "mlp.gate_up_proj")),
    "keys and values": swap_keys_and_values,
    "a shifted vocabulary": shift_vocabulary,
    "not a number": not_a_number,
}


def test_a_whole_artifact_is_proven_and_says_so(own_artifact: Path, checkpoint: Checkpoints) -> None:
    proof: Proof = prove(own_artifact, "cpu", None)
    assert proof.ok
    assert (proof.missing, proof.unused) == ([], [])
    assert proof.comparison.argmax_agreement == 1.0
    assert 0 < proof.comparison.max_abs_logit_error < proof.comparison.bound
    entry = proven(own_artifact)
    assert entry["max_abs_logit_error"] == proof.comparison.max_abs_logit_error

    # a copy without local paths keeps its proof, and its reference must be named
    moved = Path(shutil.copytree(own_artifact, own_artifact.with_name("moved")))
    shutil.rmtree(moved / ".msconv")
    assert proven(moved) == entry
    with pytest.raises(UsageError) as caught:
        prove(moved, "cpu", None)
    assert "--reference" in caught.value.hint

    # a proof that fails takes the earlier one away
    assert not prove(own_artifact, "cpu", checkpoint("other_seed")).ok
    assert proven(own_artifact) is None


def test_a_flipped_bit_is_refused_by_its_tensor(own_artifact: Path) -> None:
    change_values(own_artifact, flip_low_bit, seal=False)
    message = refused(own_artifact).message
    assert layer(2, "self_attn.qkv_proj") in message
    done = run_msconv("verify", own_artifact, "--json")
    assert done.code == 3
    assert done.json["error"]["code"] == "verification"


def test_swapped_tensors_are_refused_by_their_names(own_artifact: Path) -> None:
    change_values(own_artifact, CHANGES["q_norm and k_norm"], seal=False)
    message = refused(own_artifact).message
    assert layer(1, "self_attn.q_norm") in message
    assert layer(1, "self_attn.k_norm") in message


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_changed_graph_is_refused_by_its_name(own_artifact: Path, phase: str) -> None:
    path = own_artifact / "graphs" / "cpu" / f"{phase}.mindir"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"graphs/cpu/{phase}.mindir" in refused(own_artifact).message


def test_a_missing_rank_file_is_refused(own_artifact: Path) -> None:
    (own_artifact / RANK_0).unlink()
    assert "model-rank-0-part-0" in refused(own_artifact).message


def test_another_model_is_no_reference(own_artifact: Path, checkpoint: Checkpoints) -> None:
    assert "another model" in refused(own_artifact, checkpoint("tied")).message


def test_a_changed_config_is_refused(own_artifact: Path) -> None:
    config = own_artifact / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        prove(own_artifact, "cpu", None)
    assert run_warm("verify", own_artifact).code == 1


def test_a_directory_that_happens_to_be_here_is_no_reference(
    own_artifact: Path, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a recorded source there is none, wherever the command is run."""
    (own_artifact / ".msconv" / "source").unlink()
    monkeypatch.chdir(checkpoint("tied"))
    with pytest.raises(UsageError) as caught:
        source_of(own_artifact, None)
    assert "--reference" in caught.value.hint


CASTS = (("untied", "float16"), ("bfloat16_shards", "float32"))  # types that graphs of other variants take too


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("tied", None),
        ("yarn", None),
        ("linear_rope", None),
        ("attention_bias", None),
        ("bfloat16_shards", None),
        ("float16", None),
        ("sixteen_heads", None),
        ("short_context", None),
        ("untied", "bfloat16"),
        *(pytest.param(*cast, marks=one_of_many("test-names")) for cast in CASTS),
    ],
)
def test_every_variant_is_proven(checkpoint: Checkpoints, tmp_path: Path, variant: str, dtype: str | None) -> None:
    proof = prove(build(checkpoint(variant), tmp_path / "out", dtype=dtype), "cpu", None)
    assert proof.comparison.max_abs_logit_error < 1e-4, proof.comparison
    assert proof.ok, proof.comparison


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_values_in_the_wrong_place_are_refused_even_if_the_manifest_agrees(
    own_artifact: Path, change: Callable[[dict[str, Bits]], None]
) -> None:
    change_values(own_artifact, change, seal=True)
    proof = prove(own_artifact, "cpu", None)
    assert not proof.ok
    assert proof.comparison.max_abs_logit_error > 10 * proof.comparison.bound
    assert read_manifest(own_artifact).verified == []


@pytest.mark.slow
def test_weights_of_another_seed_exit_3(own_artifact: Path, checkpoint: Checkpoints) -> None:
    done = run_warm("verify", own_artifact, "--reference", checkpoint("other_seed"))
    assert done.code == 3
    assert "not proven" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_another_model_exits_3(own_artifact: Path, checkpoint: Checkpoints) -> None:
    done = run_warm("verify", own_artifact, "--reference", checkpoint("tied"), "--json")
    assert done.code == 3
    assert done.json["error"]["code"] == "verification"


@pytest.mark.slow
def test_a_proof_holds_for_these_graphs_and_weights_only(own_artifact: Path, checkpoint: Checkpoints) -> None:
    assert prove(own_artifact, "cpu", None).ok
    assert proven(own_artifact) is not None
    whole = read_manifest(own_artifact)

    graph = msgspec.structs.replace(whole.graphs[0], digest="xxh3:0")
    write_manifest(own_artifact, msgspec.structs.replace(whole, graphs=[graph, *whole.graphs[1:]]))
    assert proven(own_artifact) is None

    write_manifest(own_artifact, whole)
    change_values(own_artifact, flip_low_bit, seal=True)
    assert proven(own_artifact) is None

    compile_graphs(own_artifact, "cpu")
    assert proven(own_artifact) is None

    run(prepare(checkpoint("untied"), 1, output=own_artifact), force=True)
    compile_graphs(own_artifact, "cpu")
    assert proven(own_artifact) is None


@pytest.mark.slow
def test_compiling_again_gives_the_same_graphs_or_takes_the_proof_away(own_artifact: Path) -> None:
    assert prove(own_artifact, "cpu", None).ok
    before = [g.digest for g in read_manifest(own_artifact).graphs]
    compile_graphs(own_artifact, "cpu")
    same = [g.digest for g in read_manifest(own_artifact).graphs] == before
    assert (proven(own_artifact) is not None) == same


@pytest.mark.slow
def test_damage_found_by_a_verification_takes_an_earlier_proof_away(own_artifact: Path) -> None:
    assert prove(own_artifact, "cpu", None).ok
    change_values(own_artifact, flip_low_bit, seal=False)
    refused(own_artifact)
    assert proven(own_artifact) is None


@pytest.mark.slow
def test_two_processes_compile_the_same_bytes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    trees = []
    for root in (tmp_path / "a", tmp_path / "b"):
        run(prepare(checkpoint("untied"), 1, output=root))
        assert run_msconv("compile", root).code == 0
        trees.append(read_tree(root))
    assert {name for name in trees[0] if trees[0][name] != trees[1][name]} == set()


@pytest.mark.slow
def test_a_touched_graph_is_unproven_and_inspect_says_so(own_artifact: Path) -> None:
    assert prove(own_artifact, "cpu", None).ok
    assert proven(own_artifact) is not None
    graph = own_artifact / "graphs" / "cpu" / "decode.mindir"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    done = run_msconv("inspect", own_artifact, "--json")
    assert done.code == 1
    assert done.json["proven"]["cpu"] is None
    assert "decode.mindir" in run_msconv("inspect", own_artifact).stderr

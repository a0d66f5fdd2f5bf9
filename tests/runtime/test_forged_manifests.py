"""Manifests that a stranger wrote: refused, or the damage is named, or they say the same; never a crash."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv_runtime import claims
from msconv_runtime.artifact import Artifact, Draft, Manifest, digest_bytes, read_manifest
from msconv_runtime.artifact.consistency import contradiction
from msconv_runtime.artifact.integrity import check_artifact
from msconv_runtime.errors import ArtifactError
from tests.commands import run_msconv
from tests.runtime.proofs import LED, proof

SEED = 20261128
ROUNDS = 400
SECONDS = 30
WORDS = (
    "../x",
    "/etc/passwd",
    "evil",
    "",
    "\0",
    "\x1b[2J",
    "graphs/evil/x.mindir",
    "cpu\n",
    "x" * 5000,
    "ascend910b",
)
NUMBERS = (-1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**64, -(2**63), 10**30, 1.5, -0.0, 1e308)
OTHERS: tuple[Any, ...] = (None, [], {}, [None], {"a": 1}, True, [[[[[]]]]], ["x"] * 3000)


def promises(manifest: Manifest) -> tuple[set[bytes], set[bytes], set[bytes]]:
    """What is done with a manifest: which graphs are run, which weights are bound, which proofs are shown.

    Some may be missing; the words and counts that only describe them are left out."""

    def coded(value: Any, **without: Any) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(value, **without))

    plain: dict[str, Any] = {"source_dtype": "", "quant": "", "dtype": "", "dropped": [], "padded": []}
    graphs = {coded(g, mindspore="", kinds={}, min_sequences=0, groups=[]) for g in manifest.graphs}
    weights = {coded(manifest.weights, **plain)} if manifest.weights else set()
    told: dict[str, Any] = {"reference": "", "mode": "", "norms": {}, "settings": {}, "logits_compared": 1}
    told |= {"bound": 1e-4, "max_abs_logit_error": 0.0}
    proofs = {coded(v, **told) for v in manifest.verified if manifest.proof_for(v.target)}
    return graphs, weights, proofs


def put(root: Path, raw: Any) -> None:
    data = json.dumps(raw).encode()
    (root / "msconv.json").write_bytes(data)
    (root / "READY").write_text(digest_bytes(data) + "\n")


def place(value: Any, rng: random.Random) -> tuple[Any, ...]:
    """Some value of a JSON tree, by its path: down from the root, so that long lists do not outweigh the rest."""
    path: tuple[Any, ...] = ()
    while isinstance(value, dict | list) and value and (not path or rng.random() < 0.8):
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        path, value = (*path, key), value[key]
    return path


def forged(raw: Any, rng: random.Random) -> tuple[Any, tuple[Any, ...]]:
    """The same with one value changed, doubled or lost; and which."""
    out = copy.deepcopy(raw)
    path = place(out, rng)
    parent = out
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[path[-1]]))
    else:
        parent[path[-1]] = rng.choice((*WORDS, *NUMBERS, *OTHERS))
    return out, path


def test_any_forged_manifest_is_refused_or_does_no_harm(own_artifact: Path) -> None:
    root, rng = own_artifact, random.Random(SEED)
    raw = json.loads((root / "msconv.json").read_text())
    raw["verified"] = [msgspec.to_builtins(proof(root))]
    put(root, raw)
    right = read_manifest(root)
    assert check_artifact(Artifact(root)) == []
    started, refused, accepted = time.process_time(), 0, 0
    for i in range(ROUNDS):
        changed, path = forged(raw, rng)
        put(root, changed)
        try:
            manifest = read_manifest(root)
            damage = check_artifact(Artifact(root, manifest))
        except ArtifactError as e:
            refused += 1
            assert len(str(e)) < 12000, f"{i}: {path}: says too much"
            continue
        accepted += 1
        if manifest == right or damage:
            continue
        for found, allowed in zip(promises(manifest), promises(right), strict=True):
            assert found <= allowed, f"{i}: {path} may be another"
    assert refused > ROUNDS / 3
    assert accepted
    assert time.process_time() - started < SECONDS


def test_a_draft_of_no_known_kind(compiled: Path) -> None:
    told = contradiction(msgspec.structs.replace(read_manifest(compiled), draft=Draft("evil")))
    assert told == "the draft is of the kind 'evil', known are eagle3, mtp; a newer msconv may know it"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_abs_logit_error": 2e-4}, "has an error of 2.00e-04, its own bound is 1e-04"),
        ({"max_abs_logit_error": -1.0}, "has an error of -1.00e+00"),
        ({"max_abs_logit_error": float("nan")}, "has an error of nan"),
        ({"bound": float("inf")}, "has the bound inf"),
        ({"bound": 0.0}, "has the bound 0.0"),
        ({"norms": {"model.norm": 1.0}}, "has an error of 1.00e+00"),
        ({"settings": {"decode": 1.0}}, "has an error of 1.00e+00"),
        ({"argmax_agreement": 0.5}, "argmax agreed in 50.0%"),
        ({"argmax_agreement": 1.5}, "argmax agreed in 150.0%"),
        ({"ranks": 2}, "of 2 ranks, of 1"),
        ({"logits_compared": 0}, "compared 0 rows"),
        ({"graph_digests": []}, "is of no graphs"),
        ({"graph_digests": ["a", "a"]}, "is of no graphs, or of one twice"),
        ({"target": "evil"}, "is of no known target"),
        ({"settings": {"half_precision_bound": 1.0}}, "has half precision's bound"),
        ({"settings": {"prefill": "good"}}, "has a setting that is no number"),
        ({"settings": {**LED, "int8_codes_unexplained": 1}}, "led 1 of 100000 codes and left 1 unexplained"),
        ({"settings": {**LED, "int8_codes_led": 10}}, "led 10 of 100000 codes"),
        ({"settings": {"int8_drift_kl": 0.1}}, "led nan of nan codes"),
        ({"settings": {**LED, "int8_tensors_compared": -1}}, "has the number -1"),
        ({"settings": {**LED, "int8_drift_kl": 0.2, "int8_drift_kl_bound": 0.1}}, "has a divergence"),
        ({"settings": {**LED, "int8_session_kl_bound": 0.1}}, "has a divergence"),
    ],
)
def test_a_proof_that_contradicts_itself(compiled: Path, changes: dict[str, Any], told: str) -> None:
    manifest = read_manifest(compiled)
    assert contradiction(msgspec.structs.replace(manifest, verified=[proof(compiled)])) == ""
    forged = msgspec.structs.replace(manifest, verified=[proof(compiled, **changes)])
    assert told in contradiction(forged)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "x"}, "the weights have unknown element type 'x', known are bfloat16, float16, float32"),
        ({"dtype": ""}, "the weights have unknown element type ''"),
        ({"dtype": "int8"}, "the weights have unknown element type 'int8'"),
        ({"dtype": "float16"}, "the weights are float16, and none of their tensors is"),
    ],
)
def test_weights_of_an_unknown_element_type(own_artifact: Path, changes: dict[str, str], told: str) -> None:
    manifest = read_manifest(own_artifact)
    assert manifest.weights is not None
    for sound in ({"source_dtype": ""}, {"source_dtype": "x"}):
        weights = msgspec.structs.replace(manifest.weights, **sound)
        assert contradiction(msgspec.structs.replace(manifest, weights=weights)) == ""
    raw = json.loads((own_artifact / "msconv.json").read_text())
    raw["weights"] |= changes
    put(own_artifact, raw)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(own_artifact)
    assert told in caught.value.message


def test_what_is_fused_is_the_targets_and_named_once(compiled: Path) -> None:
    manifest = read_manifest(compiled)
    graph = next(g for g in manifest.graphs if g.role == "decode")
    npu = msgspec.structs.replace(graph, target="ascend910b", path="graphs/ascend910b/decode.mindir")
    for own, fused, told in ((graph, ["swiglu"], "has 'swiglu' fused"), (npu, ["swiglu"] * 2, "or twice")):
        forged = msgspec.structs.replace(own, fused=fused)
        assert told in contradiction(msgspec.structs.replace(manifest, graphs=[forged]))
    sound = msgspec.structs.replace(npu, fused=["swiglu"])
    assert contradiction(msgspec.structs.replace(manifest, graphs=[sound], verified=[])) == ""


def test_a_proof_of_other_graphs_is_none(own_artifact: Path) -> None:
    raw = json.loads((own_artifact / "msconv.json").read_text())
    raw["verified"] = [msgspec.to_builtins(proof(own_artifact, graph_digests=["xxh3:0"]))]
    put(own_artifact, raw)
    done = run_msconv("inspect", own_artifact)
    assert done.code == 0, done.stderr
    assert "cpu: UNPROVEN" in done.stdout


def test_a_proof_is_a_claim_until_it_is_made_here(
    own_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    claimed = proof(own_artifact)
    raw = json.loads((own_artifact / "msconv.json").read_text())
    raw["verified"] = [msgspec.to_builtins(claimed)]
    put(own_artifact, raw)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    done = run_msconv("inspect", own_artifact)
    assert "cpu: claimed by its author, not checked here: proven against" in done.stdout
    assert run_msconv("inspect", own_artifact, "--json").json["proven"]["cpu"]["checked_here"] is False
    assert run_msconv("report", own_artifact).code == 0
    assert "claimed by the artifact" in (own_artifact / "report.html").read_text()
    claims.note(read_manifest(own_artifact), claimed)
    assert run_msconv("inspect", own_artifact, "--json").json["proven"]["cpu"]["checked_here"] is True
    assert run_msconv("report", own_artifact).code == 0
    assert "claimed by the artifact" not in (own_artifact / "report.html").read_text()


def test_a_note_that_others_could_have_written_counts_for_nothing(
    own_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    found, manifest = proof(own_artifact), read_manifest(own_artifact)
    assert not claims.is_checked_here(manifest, found)
    claims.note(manifest, found)
    assert claims.is_checked_here(manifest, found)
    assert not claims.is_checked_here(manifest, proof(own_artifact, max_abs_logit_error=3e-6))
    (note,) = (tmp_path / "state/msconv/proofs").iterdir()
    assert (note.stat().st_mode & 0o777, note.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    for path in (note, note.parent):
        before = path.stat().st_mode
        path.chmod(0o777)
        assert not claims.is_checked_here(manifest, found)
        path.chmod(before)
    assert claims.is_checked_here(manifest, found)
    note.write_text("{}")
    assert not claims.is_checked_here(manifest, found)
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("no directory")
    claims.note(manifest, found)
    assert not claims.is_checked_here(manifest, found)

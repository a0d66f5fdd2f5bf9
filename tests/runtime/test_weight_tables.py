"""Which bytes are which tensor: manifest and headers must say the same, or nobody takes the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from msconv_runtime import claims
from msconv_runtime.artifact import (
    Artifact,
    TensorEntry,
    digest_bytes,
    digest_of,
    read_manifest,
    write_manifest,
)
from msconv_runtime.artifact.integrity import check_artifact, refuse_damage
from msconv_runtime.artifact.weights import RankWeights
from msconv_runtime.errors import ArtifactError
from tests.commands import run_msconv
from tests.runtime.proofs import proof

Q, K = (f"model.layers.0.self_attn.{name}_norm.weight" for name in "qk")
Entries = list[TensorEntry]


def sealed(root: Path, change: Callable[[Entries], Entries], header: Callable[[bytes], bytes] = bytes) -> None:
    """Change the manifest's table, and the one file's header, and make all digests fit."""
    manifest = read_manifest(root)
    assert manifest.weights is not None
    (file,) = manifest.weights.files
    data = (root / file.path).read_bytes()
    base = min(t.begin for t in manifest.weights.tensors)
    changed = header(data[:base])
    assert len(changed) == base
    (root / file.path).write_bytes(changed + data[base:])
    tensors = change(list(manifest.weights.tensors))
    file = replace(file, digest=digest_of([digest_bytes(changed), *(t.digests[0] for t in tensors)]))
    weights = replace(manifest.weights, tensors=tensors, files=[file], digest=digest_of([file.digest]))
    write_manifest(root, replace(manifest, weights=weights))


def exchanged(entries: Entries) -> Entries:
    """The norms of queries and keys under each other's name: nothing else changes, digests neither."""
    names = {Q: K, K: Q}
    return [replace(t, name=names.get(t.name, t.name)) for t in entries]


def of_q(**changes: Any) -> Callable[[Entries], Entries]:
    return lambda entries: [replace(t, **changes) if t.name == Q else t for t in entries]


def told(root: Path) -> list[tuple[str, str]]:
    return [(d.tensor, d.problem) for d in check_artifact(Artifact(root))]


TABLES: dict[str, tuple[Callable[[Entries], Entries], str, str]] = {
    "name": (of_q(name="q"), "q", "is in the manifest, and not in the file's header"),
    "type": (of_q(dtype="int32"), Q, "its element type is F32 by the file's header, I32 by the manifest"),
    "shape": (
        of_q(shape=[2, 16]),
        Q,
        "its shape is [32] by the file's header, [2, 16] by the manifest",
    ),
    "lost": (
        lambda entries: [t for t in entries if t.name != Q],
        Q,
        "is in the file's header, and not in the manifest",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_differs_from_the_header_is_damage_and_is_not_loaded(own_artifact: Path, name: str) -> None:
    change, tensor, problem = TABLES[name]
    sealed(own_artifact, lambda entries: entries)
    assert told(own_artifact) == []
    sealed(own_artifact, change)
    assert (tensor, problem) in told(own_artifact)
    with pytest.raises(ArtifactError) as caught:
        RankWeights(Artifact(own_artifact), 0)
    assert f"{tensor}: {problem}" in caught.value.message


def test_exchanged_names_are_seen_by_whoever_looks(own_artifact: Path) -> None:
    write_manifest(own_artifact, replace(read_manifest(own_artifact), verified=[proof(own_artifact)]))
    before = read_manifest(own_artifact)
    claims.note(before, before.verified[0])
    assert claims.is_checked_here(before, before.verified[0])
    assert before.weights is not None
    weights = replace(before.weights, tensors=exchanged(before.weights.tensors))
    write_manifest(own_artifact, replace(before, weights=weights))
    after = read_manifest(own_artifact)
    assert after.proof_for("cpu") == before.verified[0]
    assert not claims.is_checked_here(after, before.verified[0])
    found = told(own_artifact)
    assert {name for name, _ in found} == {Q, K}
    assert all("its place, from byte to byte, is [" in problem for _, problem in found)
    for mode in ("mmap", "read"):
        with pytest.raises(ArtifactError, match=r"[qk]_norm\.weight: its place, from byte to byte"):
            RankWeights(Artifact(own_artifact), 0, mode)
    done = run_msconv("inspect", own_artifact, "--check", "--json")
    assert done.code == ArtifactError.exit_code
    assert {d["tensor"] for d in done.json["check"]["damage"]} == {Q, K}
    assert run_msconv("inspect", own_artifact, "--json").json["proven"]["cpu"]["checked_here"] is False
    with pytest.raises(ArtifactError, match=r"q_norm\.weight: its place, from byte to byte"):  # --check-digests
        refuse_damage(Artifact(own_artifact), rank=0)


@pytest.mark.parametrize(
    "header",
    [
        lambda data: b"\xff" * len(data),
        lambda data: b"\0" * len(data),
        lambda data: data[:8] + b"[" * (len(data) - 8),
        lambda data: data[:8] + b"7".ljust(len(data) - 8),
        lambda data: data.replace(b'"shape":[', b'"shape":"', 1),
    ],
)
def test_a_header_that_is_no_table_is_said_to_be_none(
    own_artifact: Path, header: Callable[[bytes], bytes]
) -> None:
    sealed(own_artifact, lambda entries: entries, header)
    assert told(own_artifact) == [("", "its header is no table of tensors")]
    with pytest.raises(ArtifactError, match="its header is no table of tensors"):
        RankWeights(Artifact(own_artifact), 0)


def test_a_header_of_any_size_takes_no_memory(own_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msconv_runtime.artifact.integrity.MAX_HEADER_BYTES", 64)
    ((tensor, problem),) = told(own_artifact)
    assert not tensor
    assert problem.startswith("a header of ")
    assert problem.endswith(" bytes, 64 is the limit")

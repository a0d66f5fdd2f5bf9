"""A manifest that could not be read again never takes the place of one that can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from msconv_runtime.artifact import MANIFEST, READY, Artifact, read_manifest, write_manifest
from msconv_runtime.errors import ArtifactError
from tests.runtime.proofs import proof


def bytes_of(root: Path) -> list[bytes]:
    return [(root / name).read_bytes() for name in (MANIFEST, READY)]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("field", "place"),
    [
        ("settings", "verified.0.settings.int8_drift_kl"),
        ("norms", "verified.0.norms.int8_drift_kl"),
        ("bound", "verified.0.bound"),
    ],
)
def test_numbers_that_json_does_not_have_are_not_written(
    own_artifact: Path, number: float, field: str, place: str
) -> None:
    """Each would become null, which is no number to the next reader."""
    before = bytes_of(own_artifact)
    value: Any = number if field == "bound" else {"int8_drift_kl": number}
    manifest = replace(read_manifest(own_artifact), verified=[proof(own_artifact, **{field: value})])
    with pytest.raises(ArtifactError) as caught:
        write_manifest(own_artifact, manifest)
    assert caught.value.message.endswith(f"could not be read again: {place} is {number}.")
    assert bytes_of(own_artifact) == before
    assert read_manifest(own_artifact).verified == []


def test_what_readers_would_call_a_contradiction_is_not_written(own_artifact: Path) -> None:
    before = bytes_of(own_artifact)
    told = "would contradict itself and is not written: the proof for 'cpu' has an error of 1.00e"
    with pytest.raises(ArtifactError, match=told):
        Artifact(own_artifact).changed(verified=[proof(own_artifact, settings={"prefill": 1.0})])
    assert bytes_of(own_artifact) == before
    Artifact(own_artifact).changed(verified=[proof(own_artifact)])
    assert len(read_manifest(own_artifact).verified) == 1

"""Artifacts that are unfinished, altered, too new or damaged: refused, and the damage named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msconv.steps.conversion import run
from msconv_runtime.artifact import (
    FORMAT,
    Artifact,
    Manifest,
    decode_manifest,
    digest_bytes,
    directory,
    encode_manifest,
    is_artifact,
    read_manifest,
    write_manifest,
)
from msconv_runtime.artifact.integrity import Damage, check_artifact
from msconv_runtime.artifact.weights import RankWeights
from msconv_runtime.errors import ArtifactError
from tests.conftest import Checkpoints
from tests.conversions import prepare
from tests.mindirs import entry, small

TP = 4
GRAPH = small()


@pytest.fixture(scope="module")
def finished(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with weights and something in the place of a graph."""
    root = tmp_path_factory.mktemp("artifact") / "out"
    run(prepare(checkpoint("untied"), TP, output=root))
    path = root / "graphs" / "cpu" / "decode.mindir"
    path.parent.mkdir(parents=True)
    path.write_bytes(GRAPH)
    graph = entry(GRAPH)
    write_manifest(root, msgspec.structs.replace(read_manifest(root), graphs=[graph]))
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "artifact"))


def refused(root: Path) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(root)
    return caught.value


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another manifest, and a READY that vouches for it."""
    raw = json.loads((root / "msconv.json").read_text())
    change(raw)
    data = json.dumps(raw).encode()
    (root / "msconv.json").write_bytes(data)
    (root / "READY").write_text(digest_bytes(data) + "\n")


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        (value,) = f.read(1)
        f.seek(offset)
        f.write(bytes([value ^ 1 << bit]))


def damage_of(root: Path) -> list[Damage]:
    return check_artifact(Artifact(root))


def test_a_finished_artifact_is_read_and_intact(finished: Path) -> None:
    assert is_artifact(finished)
    assert read_manifest(finished).parallel.tp == TP
    assert damage_of(finished) == []


def test_a_manifest_is_the_same_after_a_round_trip(finished: Path) -> None:
    data = (finished / "msconv.json").read_bytes()
    assert encode_manifest(decode_manifest(data, "here")) == data
    assert json.loads(data)["format"] == FORMAT


def test_nothing_is_no_artifact(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere").message
    assert "not an artifact" in refused(tmp_path).message
    assert not is_artifact(tmp_path)
    assert not is_artifact(None)


def test_without_ready_it_was_never_finished(root: Path) -> None:
    (root / "READY").unlink()
    error = refused(root)
    assert "READY is missing" in error.message
    assert "resumes" in error.hint


@pytest.mark.parametrize("text", ["", "\n", "xxh3:0\n", "\udcff"])
def test_a_ready_that_vouches_for_something_else_is_refused(root: Path, text: str) -> None:
    (root / "READY").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "READY vouches for" in refused(root).message


def test_an_altered_manifest_is_refused(root: Path) -> None:
    path = root / "msconv.json"
    path.write_text(path.read_text().replace('"tp": 4', '"tp": 2'))
    assert "changed or half copied" in refused(root).message


@pytest.mark.parametrize("version", [FORMAT + 1, 99, 2**40])
def test_a_newer_format_is_refused_by_its_number(root: Path, version: int) -> None:
    def newer(raw: dict[str, Any]) -> None:
        raw.clear()
        raw.update(format=version, everything="else is different")

    rewrite(root, newer)
    error = refused(root)
    assert f"format {version}" in error.message
    assert "Upgrade" in error.hint


def test_unknown_fields_of_the_same_format_are_left_alone(root: Path) -> None:
    rewrite(root, lambda raw: raw.update(comment="added later"))
    assert read_manifest(root).parallel.tp == TP


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": "1"}',
        b'{"format": null}',
        b'{"format": 1}',
        b'{"tool": "msconv"}',
        b'{"format": 1, "tool": 3, "model": [], "parallel": 0}',
        b"[" * 100_000,
        b'{"format": 1, "x": ' + b"[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(root: Path, data: bytes) -> None:
    (root / "msconv.json").write_bytes(data)
    (root / "READY").write_text(digest_bytes(data))
    assert "not a valid manifest" in refused(root).message


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "weights/../../x", "weights\\..\\..\\x", "x\0y"])
@pytest.mark.parametrize("kind", ["weights", "graphs"])
def test_a_manifest_cannot_lead_out_of_its_directory(root: Path, kind: str, path: str) -> None:
    def lead_out(raw: dict[str, Any]) -> None:
        (raw["weights"]["files"] if kind == "weights" else raw["graphs"])[0]["path"] = path

    rewrite(root, lead_out)
    assert "outside the artifact" in refused(root).message


def tensor(raw: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(raw, "weights")["tensors"][3]  # type: ignore[no-any-return]


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a file that is none of the rank's": lambda raw: tensor(raw).update(file=99),
    "a negative file": lambda raw: tensor(raw).update(file=-1),
    "a rank beyond tp": lambda raw: raw["weights"]["files"][0].update(rank=TP),
    "a negative rank": lambda raw: raw["weights"]["files"][0].update(rank=-1),
    "a digest too few": lambda raw: tensor(raw)["digests"].pop(),
    "no digests": lambda raw: tensor(raw).update(digests=[]),
    "a negative place": lambda raw: tensor(raw).update(begin=-64),
    "a place beyond the file": lambda raw: tensor(raw).update(begin=1 << 50),
    "a place beyond 64 bits": lambda raw: tensor(raw).update(begin=1 << 63),
    "a negative part": lambda raw: tensor(raw).update(parts=[-4, 4]),
    "a part beyond the file": lambda raw: tensor(raw).update(parts=[1 << 50]),
    "no ranks": lambda raw: raw["parallel"].update(tp=0),
    "a file too few": lambda raw: raw["weights"]["files"].pop(),
    "a directory in the place of a file": lambda raw: raw["weights"]["files"][0].update(path="."),
    "nothing in the place of a file": lambda raw: raw["weights"]["files"][0].update(path=""),
    "a directory in the place of a graph": lambda raw: raw["graphs"][0].update(path="."),
    "a tensor twice": lambda raw: raw["weights"]["tensors"].append(tensor(raw)),
    "a tensor too few": lambda raw: raw["weights"]["tensors"].pop(),
    "a shape of other bytes": lambda raw: tensor(raw).update(shape=[3, 5]),
    "an element type there is not": lambda raw: tensor(raw).update(dtype="float7"),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused_or_reported(
    root: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(root, change)
    try:
        damage = damage_of(root)
    except ArtifactError:
        return
    assert damage


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_loading_by_a_manifest_that_contradicts_itself_fails_in_words_if_at_all(
    root: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(root, change)
    with suppress(ArtifactError):
        for rank in range(TP):
            weights = RankWeights(Artifact(root), rank)
            for name in weights.tensors:
                weights.raw(name)


# Writing


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_crash_while_the_manifest_is_replaced_leaves_the_old_or_the_new(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Three files are replaced: READY for both manifests, the manifest, READY for the new one."""
    old = read_manifest(root)
    new = msgspec.structs.replace(old, tool="msconv 9.9.9")
    original, calls = directory.replace_file, [0]

    def crashing(path: Path, data: bytes) -> None:
        if calls[0] == step:
            raise KeyboardInterrupt
        calls[0] += 1
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "replace_file", crashing)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(root, new)
    assert read_manifest(root) == (old if step < 2 else new)
    write_manifest(root, new)
    assert read_manifest(root) == new
    assert len((root / "READY").read_text().split()) == 1


def test_a_ready_with_two_digests_vouches_for_both_and_no_other(root: Path) -> None:
    data = (root / "msconv.json").read_bytes()
    other = data.replace(b'"msconv 0', b'"msconv 1')
    assert other != data
    (root / "READY").write_text(f"{digest_bytes(data)}\n{digest_bytes(other)}\n")
    assert isinstance(read_manifest(root), Manifest)
    (root / "msconv.json").write_bytes(other)
    assert read_manifest(root).tool.startswith("msconv 1")
    (root / "msconv.json").write_bytes(data.replace(b'"msconv 0', b'"msconv 2'))
    assert "vouches" in refused(root).message


def test_the_first_manifest_is_not_vouched_for_before_it_is_there(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(finished)
    original = directory.replace_file

    def crashing(path: Path, data: bytes) -> None:
        if path.name == "READY":
            raise KeyboardInterrupt
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "replace_file", crashing)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(tmp_path, manifest)
    assert "READY is missing" in refused(tmp_path).message


# Integrity


def places(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """(bytes of the header, {tensor: (begin, end) in the file}) as the file itself says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    return 8 + length, {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_found_and_its_tensor_named(
    data: st.DataObject, finished: Path, tmp_path: Path
) -> None:
    root = tmp_path / "flipped"
    if not root.exists():
        shutil.copytree(finished, root)
    relative = f"weights/model-rank-{data.draw(st.integers(0, TP - 1))}-part-0.safetensors"
    path = root / relative
    header, tensors = places(path)
    begin, end = data.draw(st.sampled_from([(0, header), *tensors.values()]))
    offset, bit = data.draw(st.integers(begin, end - 1)), data.draw(st.integers(0, 7))
    name = next((n for n, (a, b) in tensors.items() if a <= offset < b), "")
    flip(path, offset, bit)
    try:
        (damage,) = damage_of(root)
    finally:
        flip(path, offset, bit)
    assert (damage.path, damage.tensor) == (relative, name)
    assert damage_of(root) == []


@pytest.mark.parametrize("offset", [0, 7, 8, 500])
def test_a_flipped_bit_of_the_header_is_found(root: Path, offset: int) -> None:
    flip(root / "weights/model-rank-1-part-0.safetensors", offset)
    (damage,) = damage_of(root)
    assert "model-rank-1-part-0" in damage.path
    assert "header" in damage.problem


def test_a_flipped_bit_of_the_headers_padding_is_found(root: Path) -> None:
    path = root / "weights/model-rank-0-part-0.safetensors"
    header, _ = places(path)
    offset = path.read_bytes()[:header].rindex(b"}") + 1
    flip(path, min(offset, header - 1))
    (damage,) = damage_of(root)
    assert "header" in damage.problem


def test_a_flipped_bit_of_the_vocabularys_padding_names_the_tensor(root: Path) -> None:
    path = root / f"weights/model-rank-{TP - 1}-part-0.safetensors"
    _, tensors = places(path)
    flip(path, tensors["lm_head.weight"][1] - 1)  # 1003 rows in 4 x 251: the last one is padding
    (damage,) = damage_of(root)
    assert damage.tensor == "lm_head.weight"


def test_all_damage_is_found(root: Path) -> None:
    for rank, name in ((0, "model.norm.weight"), (0, "lm_head.weight"), (2, "vocab_start")):
        path = root / f"weights/model-rank-{rank}-part-0.safetensors"
        flip(path, places(path)[1][name][0])
    found = {(d.path[8:20], d.tensor) for d in damage_of(root)}
    assert found == {
        ("model-rank-0", "model.norm.weight"),
        ("model-rank-0", "lm_head.weight"),
        ("model-rank-2", "vocab_start"),
    }


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named_with_both_sizes(root: Path, change: int) -> None:
    path = root / "weights/model-rank-2-part-0.safetensors"
    size = path.stat().st_size
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"\0")
    (damage,) = damage_of(root)
    assert "model-rank-2" in damage.path
    assert str(size) in damage.problem
    assert str(size + change) in damage.problem


def test_a_missing_file_is_named(root: Path) -> None:
    (root / "weights/model-rank-3-part-0.safetensors").unlink()
    (damage,) = damage_of(root)
    assert "model-rank-3" in damage.path


def test_two_rank_files_in_each_others_place_are_found(root: Path) -> None:
    a, b = (root / f"weights/model-rank-{rank}-part-0.safetensors" for rank in (0, 1))
    a.rename(root / "aside")
    b.rename(a)
    (root / "aside").rename(b)
    assert {d.path[8:20] for d in damage_of(root)} == {"model-rank-0", "model-rank-1"}


@pytest.mark.parametrize("data", [b"\0" + GRAPH[1:], GRAPH + b"!", None])
def test_a_changed_graph_is_found(root: Path, data: bytes | None) -> None:
    path = root / "graphs/cpu/decode.mindir"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    (damage,) = damage_of(root)
    assert damage.path == "graphs/cpu/decode.mindir"

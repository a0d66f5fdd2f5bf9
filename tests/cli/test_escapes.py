"""Names that come from others do not steer the terminal, whatever a command says of them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from msconv.cli.console import visible
from msconv_runtime.artifact import Dropped, Manifest, Padding, read_manifest, write_manifest
from tests.checkpoints import edit_json, read_checkpoint, write_safetensors
from tests.commands import Result, run_msconv
from tests.conftest import Checkpoints

STEERING = "\x1b[2J\x9b1m\x07\r\x7f\u202e\nNext: rm"  # clears, colours, rings, goes back, turns over, forges
WRITTEN = r"\x1b[2J\x9b1m\x07\r\x7f\u202e\nNext: rm"


def evil(manifest: Manifest) -> Manifest:
    """The same with such characters in every string that may have any."""
    weights = manifest.weights
    assert weights is not None
    tensors = [replace(t, name=t.name + STEERING) for t in weights.tensors]
    graphs = [replace(g, mindspore=g.mindspore + STEERING) for g in manifest.graphs]  # no other target is read
    model = manifest.model
    return replace(
        manifest,
        tool=manifest.tool + STEERING,
        model=replace(model, source=model.source + STEERING, family=model.family + STEERING),
        weights=replace(
            weights,
            source_dtype="float32" + STEERING,
            tensors=tensors,
            files=[replace(f, path=f.path + STEERING) for f in weights.files],
            dropped=[Dropped("a" + STEERING, 1, "b" + STEERING)],
            padded=[Padding("vocab" + STEERING, 1, 2)],
        ),
        graphs=graphs,
    )


def check_plain(done: Result) -> None:
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert not re.search(r"[^\n -~]|^Next: rm", said, re.M), said
    assert r"\x1b[2J" in said


@pytest.mark.parametrize(
    "line",
    [
        ("inspect", "--json"),
        ("serve", "--print-command"),
        ("doctor",),
        ("verify",),
        ("push", "--to", "a/b"),
    ],
    ids=lambda line: " ".join(map(str, line)),
)
def test_the_strings_of_a_manifest_are_written_out(own_artifact: Path, line: tuple[Any, ...]) -> None:
    write_manifest(own_artifact, evil(read_manifest(own_artifact)))
    done = run_msconv(line[0], own_artifact, *line[1:])
    assert not re.search(r"[^\n -~]|^Next: rm", done.stdout + done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert "fault in msconv" not in done.stderr


def test_inspect_shows_them_in_their_lines(own_artifact: Path) -> None:
    write_manifest(own_artifact, evil(read_manifest(own_artifact)))
    done = run_msconv("inspect", own_artifact)
    check_plain(done)
    for name in (
        "untied",
        "qwen3",
        "model.norm.weight",
        "mindspore 2.10.0",
        "vocab",
        "weights/model-rank-0-part-0.safetensors",
    ):
        assert name + WRITTEN in done.stdout + done.stderr, name


def test_a_contradiction_names_its_tensor_written_out(own_artifact: Path) -> None:
    manifest = evil(read_manifest(own_artifact))
    assert manifest.weights is not None
    tensors = [replace(t, begin=1 << 40) for t in manifest.weights.tensors]
    write_manifest(own_artifact, replace(manifest, weights=replace(manifest.weights, tensors=tensors)))
    for line in (("inspect",), ("serve",)):
        done = run_msconv(*line, own_artifact)
        assert done.code == 1
        check_plain(done)


def test_a_checkpoint_cannot_steer_it_either(own_checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = own_checkpoint("untied")
    named = model.rename(model.with_name("m\x1b[2Jodel"))
    done = run_msconv("convert", "--model", named, "--tp", 2, "--output", tmp_path / "o\x1b[2Jut")
    assert done.code == 0, done.stderr
    check_plain(done)
    check_plain(run_msconv("plan", "--model", named, "--tp", 2))
    tensors = read_checkpoint(named)
    write_safetensors(named / "model.safetensors", {n + "\x1b[2J": t for n, t in tensors.items()})
    check_plain(run_msconv("plan", "--model", named, "--tp", 2))
    edit_json(named / "config.json", architectures=["\x1b[2J"])
    check_plain(run_msconv("plan", "--model", named, "--tp", 2))


def test_what_is_printable_stays_as_it_is() -> None:
    assert visible("Größe 模型 🙂 a b") == "Größe 模型 🙂 a b"
    assert visible("a\nb") == "a\nb"
    assert visible("a\nb", keep="") == r"a\nb"
    assert visible(os.fsdecode(b"m\xff")) == r"m\udcff"


@pytest.mark.parametrize("line", [("inspect",), ("serve", "--print-command"), ("doctor",), ("report",)])
def test_a_target_that_is_none_is_written_out(own_artifact: Path, line: tuple[str, ...]) -> None:
    manifest = read_manifest(own_artifact)
    graphs = [replace(g, target=g.target + STEERING) for g in manifest.graphs]
    write_manifest(own_artifact, replace(manifest, graphs=graphs))
    done = run_msconv(line[0], own_artifact, *line[1:])
    assert done.code
    check_plain(done)

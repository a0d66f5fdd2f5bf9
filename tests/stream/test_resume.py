"""Conversions that crash, are killed or find their source changed, and go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv.steps.conversion import run
from msconv.stream.journal import Journal
from msconv.stream.outputs import Outputs
from msconv_runtime.artifact import Artifact, read_manifest, write_manifest
from msconv_runtime.artifact.integrity import check_artifact
from msconv_runtime.errors import (
    ArtifactError,
    CheckpointError,
    PlanError,
)
from tests.checkpoints import (
    Stored,
    edit_json,
    read_checkpoint,
    read_tree,
    write_safetensors,
)
from tests.commands import run_msconv, run_python
from tests.conftest import Checkpoints
from tests.conversions import convert, prepare
from tests.mindirs import entry, small
from tests.stream.crashes import Crash, crash


def half_done(model: Path, output: Path, tensors: int = 20, **options: Any) -> None:
    crash(tensors, lambda: convert(model, output, **options))


KILLED = """
import os, signal, sys, time
import msconv.stream.execute as streaming
tensors, how = int(sys.argv[1]), sys.argv[2]
import msconv.stream.movers.threads as threads
original, streaming.CHECKPOINT_BYTES = threads.move_unit, 1
def move(*args, **kwargs):
    global tensors
    tensors -= 1
    if tensors < 0:
        time.sleep(0.3)  # for the journal
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(0.3)
    return original(*args, **kwargs)
threads.move_unit = move
sys.argv[1:] = sys.argv[3:]
from msconv.cli import main
main()
"""


@pytest.mark.parametrize("tensors", [0, 1, 25, 46])
def test_a_killed_conversion_resumes_to_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, tensors: int
) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    options = ("--model", model, "--tp", 4, "--jobs", 1, "--output", out)
    killed = run_python(KILLED, tensors, "SIGKILL", "convert", *options)
    assert killed.code == -9
    assert not (out / "READY").exists()
    with pytest.raises(ArtifactError, match="not finished"):
        read_manifest(out)
    done = convert(model, out, 4)
    assert done.resumed == (tensors > 0)
    convert(model, tmp_path / "whole", 4)
    assert read_tree(out) == read_tree(tmp_path / "whole")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_an_interrupted_conversion_exits_130_and_resumes(
    checkpoint: Checkpoints, tmp_path: Path, how: str
) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    options = ("convert", "--model", model, "--tp", 2, "--output", out)
    stopped = run_python(KILLED, 20, how, *options)
    assert stopped.code == 130
    assert "Traceback" not in stopped.stderr
    assert not (out / "READY").exists()
    again = run_msconv(*options, "--json")
    assert again.code == 0
    assert again.json["resumed"] is True
    convert(model, tmp_path / "whole", 2)
    assert read_tree(out) == read_tree(tmp_path / "whole")


def test_a_resumed_conversion_reads_only_the_rest(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    half_done(model, out, 20)
    done = convert(model, out)
    assert done.resumed
    whole = convert(model, tmp_path / "whole")
    assert 0 < done.bytes_read < whole.bytes_read
    assert 0 < done.bytes_written < whole.bytes_written


def test_a_torn_last_line_of_the_journal_is_done_again(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    half_done(model, out, 20, tp=2)
    journal = next((out / ".msconv").glob("journal*"))
    journal.write_bytes(journal.read_bytes()[:-30])
    convert(model, out, 2)
    convert(model, tmp_path / "whole", 2)
    assert read_tree(out) == read_tree(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"\n", b"garbage", b"{}\n", b'{"tool": "\xa5"}\n'])
def test_a_lost_journal_starts_over(checkpoint: Checkpoints, tmp_path: Path, damage: bytes) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    half_done(model, out, 20, tp=2)
    next((out / ".msconv").glob("journal*")).write_bytes(damage)
    convert(model, out, 2)
    convert(model, tmp_path / "whole", 2)
    assert read_tree(out) == read_tree(tmp_path / "whole")


def test_files_lost_since_the_crash_are_written_again_and_counted(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    half_done(model, out, 20, tp=2)
    next((out / "weights").iterdir()).unlink()
    done = convert(model, out, 2)
    whole = convert(model, tmp_path / "whole", 2)
    assert read_tree(out) == read_tree(tmp_path / "whole")
    assert done.bytes_read == whole.bytes_read


def test_ready_is_never_there_while_weights_are_not(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash right after READY, and another one in the run that cleans up after it."""
    model, out = checkpoint("untied"), tmp_path / "out"

    def die(*args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", die)
        with pytest.raises(Crash):
            convert(model, out, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "publish", die)
        with suppress(Crash):
            convert(model, out, 2)
    try:
        artifact = Artifact(out)
    except ArtifactError:
        pass  # unfinished, and says so
    else:
        assert check_artifact(artifact) == []
    convert(model, out, 2)
    convert(model, tmp_path / "whole", 2)
    assert read_tree(out) == read_tree(tmp_path / "whole")


def test_graphs_survive_a_crash_between_ready_and_the_end(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"

    def die(*args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", die)
        with pytest.raises(Crash):
            convert(model, out)
    graph = msgspec.structs.replace(entry(small()), reads=[])  # of no other weights than these
    manifest = read_manifest(out)
    write_manifest(
        out, type(manifest)(**{**{f: getattr(manifest, f) for f in manifest.__struct_fields__}, "graphs": [graph]})
    )
    convert(model, out)
    assert read_manifest(out).graphs == [graph]


def touch(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


def change_a_value(model: Path) -> None:
    tensors = read_checkpoint(model)
    tensors["model.norm.weight"] = Stored("F32", tensors["model.norm.weight"].bits ^ 1)
    write_safetensors(model / "model.safetensors", tensors)


def change_the_config(model: Path) -> None:
    edit_json(model / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6})


@pytest.mark.parametrize(
    ("change", "word"),
    [(touch, "source files"), (change_a_value, "source files"), (change_the_config, "config.json")],
)
def test_a_source_that_changed_since_the_crash_is_refused_and_named(
    own_checkpoint: Checkpoints, tmp_path: Path, change: Callable[[Path], None], word: str
) -> None:
    model, out = own_checkpoint("untied"), tmp_path / "out"
    half_done(model, out)
    change(model)
    with pytest.raises(PlanError) as caught:
        convert(model, out)
    assert word in caught.value.message
    assert "--force" in caught.value.hint
    convert(model, out, force=True)
    convert(model, tmp_path / "whole")
    assert read_tree(out) == read_tree(tmp_path / "whole")


@pytest.mark.parametrize(("tp", "options"), [(4, {}), (2, {"dtype": "float16"})])
def test_another_layout_into_a_half_done_conversion_is_refused_and_named(
    checkpoint: Checkpoints, tmp_path: Path, tp: int, options: dict[str, Any]
) -> None:
    half_done(checkpoint("untied"), tmp_path / "out", tp=2)
    with pytest.raises(PlanError, match="layout"):
        convert(checkpoint("untied"), tmp_path / "out", tp, **options)


@pytest.mark.parametrize("how", ["longer", "shorter", "touched", "gone"])
def test_a_source_that_changes_during_a_conversion_is_an_error(
    own_checkpoint: Checkpoints, tmp_path: Path, how: str
) -> None:
    model, out = own_checkpoint("untied"), tmp_path / "out"
    conversion = prepare(model, 2, output=out)
    path = model / "model.safetensors"
    if how == "longer":
        with path.open("ab") as f:
            f.write(b"more")
    elif how == "shorter":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "touched":
        os.utime(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        run(conversion)
    assert "model.safetensors" in caught.value.message
    assert not (out / "READY").exists()

"""Whole conversions: every byte in its place, whatever the workers and the directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.steps.conversion import run
from msconv.stream.buffers import BufferSizes
from msconv_runtime.artifact import Artifact, read_manifest
from msconv_runtime.artifact.integrity import check_artifact
from msconv_runtime.errors import (
    ArtifactError,
    BusyError,
    CheckpointError,
    MsconvError,
    ResourceError,
    UsageError,
)
from tests.checkpoints import (
    make_qwen3,
    read_checkpoint,
    read_rank,
    read_tree,
)
from tests.commands import run_msconv
from tests.conftest import Checkpoints
from tests.conversions import config_of, convert, join, prepare, with_buffers

CASES = [(variant, tp) for variant in ("untied", "tied", "attention_bias") for tp in (1, 2, 4, 8)]
CASES += [("bfloat16_shards", tp) for tp in (2, 8)] + [("sixteen_heads", tp) for tp in (2, 4, 8, 16)]


@pytest.mark.parametrize(("variant", "tp"), CASES)
def test_all_ranks_joined_are_the_source_bit_for_bit(
    checkpoint: Checkpoints, tmp_path: Path, variant: str, tp: int
) -> None:
    model = checkpoint(variant)
    convert(model, tmp_path / "out", tp)
    source = read_checkpoint(model)
    joined = join(tmp_path / "out", tp, config_of(model))
    assert set(joined) == set(source)
    for name, tensor in source.items():
        assert np.array_equal(joined[name], tensor.bits), name


@pytest.mark.parametrize("tp", [2, 16])
def test_ranks_know_where_they_are(checkpoint: Checkpoints, tmp_path: Path, tp: int) -> None:
    convert(checkpoint("sixteen_heads"), tmp_path / "out", tp)
    rows = -(-1003 // tp)
    for rank in range(tp):
        tensors = read_rank(tmp_path / "out", rank)
        assert tensors["vocab_start"].bits.tolist() == [rank * rows]
        onehot = tensors["rank_onehot"].bits.view(np.float32).ravel()
        assert onehot.tolist() == [float(r == rank) for r in range(tp)]


def test_one_rank_needs_no_word_about_ranks(checkpoint: Checkpoints, tmp_path: Path) -> None:
    convert(checkpoint("untied"), tmp_path / "out")
    assert not {"vocab_start", "rank_onehot"} & set(read_rank(tmp_path / "out", 0))


def test_transformers_reads_the_files(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from safetensors import safe_open

    convert(checkpoint("bfloat16_shards"), tmp_path / "out", 2)
    own = read_rank(tmp_path / "out", 1)
    with safe_open(tmp_path / "out/weights/model-rank-1-part-0.safetensors", "pt") as f:
        assert set(f.keys()) == set(own)
        for name, tensor in own.items():
            assert list(f.get_tensor(name).shape) == list(tensor.bits.shape)


@pytest.mark.parametrize("tp", [1, 4])
def test_any_number_of_workers_writes_the_same_bytes(checkpoint: Checkpoints, tmp_path: Path, tp: int) -> None:
    trees = []
    for jobs in (1, 2, 5):
        convert(checkpoint("bfloat16_shards"), tmp_path / str(jobs), tp, jobs=jobs)
        trees.append(read_tree(tmp_path / str(jobs)))
    assert {"msconv.json", "READY", "config.json"} <= set(trees[0])
    assert trees[0] == trees[1] == trees[2]


def test_a_block_smaller_than_a_tensor_writes_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint("untied"), tmp_path / "whole", 4)
    conversion = prepare(checkpoint("untied"), 4, output=tmp_path / "blocks")
    run(with_buffers(replace(conversion, jobs=2), BufferSizes(4096, 4096)))
    assert read_tree(tmp_path / "blocks") == read_tree(tmp_path / "whole")


def test_shards_and_one_file_give_the_same_weights(tmp_path: Path) -> None:
    make_qwen3(tmp_path / "a" / "model", dtype="bfloat16")
    make_qwen3(tmp_path / "b" / "model", dtype="bfloat16", shards=9)
    for side in "ab":
        convert(tmp_path / side / "model", tmp_path / f"{side}-out", 2)
    a, b = (read_manifest(tmp_path / f"{side}-out").weights for side in "ab")
    assert a is not None
    assert a == b


def test_the_artifact_is_a_model_directory_too(own_checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = own_checkpoint("untied")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"):
        (model / name).write_text(name)
    for name in ("modeling.py", "pytorch_model.bin", "training_args.bin"):
        (model / name).write_text("never copied")
    convert(model, tmp_path / "out")
    tree = read_tree(tmp_path / "out")
    assert tree["config.json"] == (model / "config.json").read_bytes()
    assert tree["tokenizer.json"] == b"tokenizer.json"
    assert set(tree) == {
        "READY",
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        "msconv.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights/model-rank-0-part-0.safetensors",
    }


def test_the_finished_bytes_are_what_the_manifest_says(checkpoint: Checkpoints, tmp_path: Path) -> None:
    convert(checkpoint("tied"), tmp_path / "out", 4)
    manifest = read_manifest(tmp_path / "out")
    assert check_artifact(Artifact(tmp_path / "out")) == []
    assert manifest.model.source == "tied"
    assert manifest.parallel.tp == 4
    assert manifest.weights is not None
    assert [(p.name, p.size, p.padded) for p in manifest.weights.padded] == [("vocab", 1003, 1004)]


# Running again


def test_running_again_on_a_finished_artifact_changes_nothing(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint("untied"), out, 2)
    before, times = read_tree(out), {p: p.stat().st_mtime_ns for p in out.rglob("*") if ".msconv" not in p.parts}
    again = convert(checkpoint("untied"), out, 2)
    assert (again.bytes_read, again.bytes_written, again.resumed) == (0, 0, True)
    assert read_tree(out) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_running_again_notices_a_rank_file_that_is_gone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint("untied"), out, 2)
    before = read_tree(out)
    (out / "weights/model-rank-1-part-0.safetensors").unlink()
    try:
        convert(checkpoint("untied"), out, 2)
    except MsconvError as e:
        assert "model-rank-1-part-0" in e.message
    else:
        assert read_tree(out) == before


def test_force_starts_over_and_gives_the_same_bytes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint("untied"), out, 2)
    before = read_tree(out)
    damaged = out / "weights/model-rank-0-part-0.safetensors"
    damaged.write_bytes(b"damaged")
    done = convert(checkpoint("untied"), out, 2, force=True)
    assert done.bytes_read > 0
    assert not done.resumed
    assert read_tree(out) == before


def test_force_leaves_nothing_of_another_model(own_checkpoint: Checkpoints, tmp_path: Path) -> None:
    first, second = own_checkpoint("untied"), own_checkpoint("tied")
    (first / "merges.txt").write_text("of the first model")
    (first / "chat_template.jinja").write_text("of the first model")
    out = tmp_path / "out"
    convert(first, out, 4)
    convert(second, out, 2, force=True)
    convert(second, tmp_path / "fresh", 2)
    assert read_tree(out) == read_tree(tmp_path / "fresh")


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_holds_something_else_is_refused_and_untouched(
    checkpoint: Checkpoints, tmp_path: Path, force: bool
) -> None:
    out = tmp_path / "out"
    (out / "weights").mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    (out / "weights" / "model-rank-0-part-0.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        convert(checkpoint("untied"), out, force=force)
    assert sorted(p.name for p in out.rglob("*")) == ["model-rank-0-part-0.safetensors", "thesis.tex", "weights"]
    assert (out / "weights" / "model-rank-0-part-0.safetensors").read_text() == "mine"


def test_nothing_is_written_into_an_artifact_from_outside(
    checkpoint: Checkpoints, compiled: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(compiled, tmp_path / "own"))
    before = read_tree(root)
    for command in (
        ("convert", checkpoint("untied"), "--tp", 2, "--output", root / "sub"),
        ("reshard", root, "--tp", 2, "--output", root / "sub" / "deep"),
        ("compile", "--model", checkpoint("untied"), "--tp", 2, "--target", "cpu", "--output", root / "sub"),
        ("compile", root, "--target", "cpu", "--graphs", root),
        ("compile", root, "--target", "cpu", "--graphs", root / "graphs"),
    ):
        done = run_msconv(*command)
        assert done.code == 2, command
        assert f"lies in the artifact {root}" in done.stderr
    assert read_tree(root) == before


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_tokenizer_that_cannot_be_copied_is_no_tokenizer_left_out(
    own_checkpoint: Checkpoints, tmp_path: Path, kind: str
) -> None:
    model = own_checkpoint("untied")
    path = model / "tokenizer.json"
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere") if kind == "link" else path.mkdir()
    said = "a link to nothing" if kind == "link" else "no regular file"
    with pytest.raises(CheckpointError, match=f"tokenizer.json: is {said}"):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_the_output(own_checkpoint: Checkpoints, force: bool) -> None:
    model = own_checkpoint("untied")
    before = read_tree(model)
    with pytest.raises(UsageError, match="source directory"):
        convert(model, model, force=force)
    assert read_tree(model) == before


def test_a_file_is_no_output_directory(checkpoint: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="not a directory"):
        convert(checkpoint("untied"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_force_keeps_files_that_msconv_did_not_write(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint("untied"), out)
    (out / "notes.txt").write_text("mine")
    convert(checkpoint("untied"), out, force=True)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("variant", "tp", "options"),
    [("tied", 2, {}), ("other_seed", 2, {}), ("untied", 4, {}), ("untied", 2, {"dtype": "bfloat16"})],
)
def test_another_conversion_into_a_finished_artifact_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, variant: str, tp: int, options: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    convert(checkpoint("untied"), out, 2)
    before = read_tree(out)
    with pytest.raises(ArtifactError) as caught:
        convert(checkpoint(variant), out, tp, **options)
    assert "--force" in caught.value.hint
    assert read_tree(out) == before


# At the same time, or without the right to

HOLDER = """
import sys, time
from pathlib import Path
from msconv.workspace.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(out: Path) -> Iterator[int]:
    """Another process works in `out`.  Its id."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("force", [False, True])
def test_a_second_process_learns_who_is_at_work(checkpoint: Checkpoints, tmp_path: Path, force: bool) -> None:
    with held(tmp_path / "out") as pid:
        with pytest.raises(BusyError) as caught:
            convert(checkpoint("untied"), tmp_path / "out", force=force)
        assert f"process {pid} " in caught.value.message
        command = run_msconv("convert", "--model", checkpoint("untied"), "--tp", 1, "--output", tmp_path / "out")
        assert command.code == 1
        assert str(pid) in command.stderr
    assert convert(checkpoint("untied"), tmp_path / "out").bytes_read > 0  # a dead holder holds nothing


def ordinary_rights() -> None:
    """Root may write anywhere; take that away before the command starts."""
    import ctypes

    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.parametrize("nested", [False, True])
def test_an_output_that_cannot_be_written_is_said_so(
    checkpoint: Checkpoints, tmp_path: Path, nested: bool
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    out = closed / "out" if nested else closed
    done = run_msconv(
        "convert", "--model", checkpoint("untied"), "--tp", 1, "--output", out, "--json", before=ordinary_rights
    )
    assert done.code == 5
    assert done.json["error"]["code"] == "resource"
    assert str(closed) in done.json["error"]["message"]
    assert "--output" in done.json["error"]["hint"]
    assert not list(closed.iterdir())


def small_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_write_that_fails_is_said_so_and_resumes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = ("convert", "--model", checkpoint("untied"), "--tp", 1, "--output", tmp_path / "out", "--json")
    failed = run_msconv(*options, before=small_files)
    assert failed.code == 5
    assert failed.json["error"]["code"] == "resource"
    assert not (tmp_path / "out" / "READY").exists()
    assert run_msconv(*options).code == 0
    convert(checkpoint("untied"), tmp_path / "whole")
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")


def test_too_little_memory_is_an_error_that_says_how_much(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        convert(checkpoint("untied"), tmp_path / "out", max_memory=1 << 20)
    assert "--max-memory" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = ("--model", checkpoint("untied"), "--tp", 2, "--dry-run")
    done = run_msconv("convert", *options, "--json", cwd=tmp_path)
    assert done.code == 0
    assert not list(tmp_path.iterdir())
    real = run_msconv("convert", *options[:-1], cwd=tmp_path)
    assert real.code == 0
    files = list((tmp_path / "artifacts" / "untied-tp2" / "weights").iterdir())
    assert done.json["output_bytes"] == sum(p.stat().st_size for p in files)
    assert [rank["weight_bytes"] for rank in done.json["ranks"]] == [p.stat().st_size for p in files]

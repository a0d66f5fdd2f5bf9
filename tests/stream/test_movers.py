"""The seam for conversion on many machines: work is values, and another process that has only those gives the same
bytes."""

from __future__ import annotations

import os
import pickle
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import msconv.stream.execute as streaming
from msconv.checkpoint.directory import open_checkpoint
from msconv.checkpoint.hub import Repository
from msconv.checkpoint.remote import RemoteFile
from msconv.location import HubRepository
from msconv.steps.conversion import Conversion, run
from msconv.steps.reshard import prepare as prepare_reshard
from msconv.stream.source import DirectorySource
from msconv_runtime.errors import CheckpointError, ResourceError
from tests.checkpoints import read_tree
from tests.conftest import Checkpoints
from tests.conversions import convert, prepare
from tests.stream.moe_models import KINDS, Artifacts, Models
from tests.stream.processes import Processes


def moved_elsewhere(conversion: Conversion, jobs: int = 2) -> dict[str, bytes]:
    """The artifact that other processes made, from what survives being pickled."""
    mover, progress = Processes(jobs), list[int]()
    done = run(pickle.loads(pickle.dumps(conversion)), progress=progress.append, mover=mover)
    assert mover.seen
    assert os.getpid() not in mover.seen
    assert done.bytes_read == sum(progress) == conversion.plan.read_bytes
    return read_tree(conversion.output)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek FP8"])
def test_processes_that_have_only_values_write_the_same_bytes(
    model: Models, artifact: Artifacts, tmp_path: Path, kind: str
) -> None:
    conversion = prepare(model(kind), 4, 2, KINDS[kind][1], tmp_path / "out")
    assert moved_elsewhere(conversion) == read_tree(artifact(kind, 4, 2))


def test_processes_reshard_from_values_to_the_same_bytes(
    model: Models, artifact: Artifacts, tmp_path: Path
) -> None:
    moved = moved_elsewhere(prepare_reshard(artifact("deepseek FP8", 4, 2), 2, 1, tmp_path / "out"))
    direct = read_tree(artifact("deepseek FP8", 2, 1))
    assert {n: b for n, b in moved.items() if n.startswith("weights/")} == {
        n: b for n, b in direct.items() if n.startswith("weights/")
    }


def test_what_is_read_of_a_hub_travels_as_its_name_and_commit(checkpoint: Checkpoints, tmp_path: Path) -> None:
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "out")
    remote = {n: RemoteFile(n, f.size, "0" * 64) for n, f in conversion.shards.items()}
    repository = Repository("owner/name", "main", "1" * 40, remote, own=tmp_path / "downloads")
    assert repository.cache.name == "models--owner--name"  # what is kept once asked for travels too
    location = HubRepository(repository)
    source = location.shards(open_checkpoint(checkpoint("untied")))
    task = replace(conversion.task, source=source)
    assert pickle.loads(pickle.dumps(task)) == task


def test_a_process_that_dies_leaves_work_that_threads_go_on_with(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHECKPOINT_BYTES", 1)
    convert(checkpoint("untied"), tmp_path / "whole", 2)
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "out")
    units = sorted(conversion.plan.units, key=lambda u: conversion.plan.sources[u[0]].offset)
    with pytest.raises(BrokenProcessPool):
        run(conversion, mover=Processes(1, fatal=units[len(units) // 2][0]))
    assert not (tmp_path / "out" / "READY").exists()
    done = run(conversion)
    assert done.resumed
    assert 0 < done.bytes_read < conversion.plan.read_bytes
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")


def test_an_error_of_another_process_is_told_in_its_words(own_checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = own_checkpoint("untied")
    conversion = prepare(model, 2, output=tmp_path / "out")
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="became shorter during conversion") as caught:
        run(conversion, mover=Processes(1))
    assert "convert again" in caught.value.hint
    assert not (tmp_path / "out" / "READY").exists()


def test_outputs_that_nobody_allocated_cannot_be_opened(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A worker that looks at another directory must not begin files of its own."""
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "out")
    (tmp_path / "out" / "weights").mkdir(parents=True)
    with pytest.raises(ResourceError, match="No such file"):
        conversion.task.outputs.open()
    assert not list((tmp_path / "out" / "weights").iterdir())


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_while_workers_begin_closes_nothing_under_them(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """One that comes when a thread has just started; and one more while it is waited for."""
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "out", jobs=2)
    begin, wait_for = threading.Thread.start, threading.Condition.wait_for
    read, closed, problems = DirectorySource.read, DirectorySource.close, list[str]()
    reading = threading.Event()
    left = [times - 1]

    def slow(self: DirectorySource, *args: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            time.sleep(0.05)
        try:
            read(self, *args)  # type: ignore[arg-type]
        except Exception as e:
            problems.append(f"{type(e).__name__}: {e}")
            raise
        if getattr(self, "is_closed", False):
            problems.append("read after it was closed")

    def close(self: DirectorySource) -> None:
        self.is_closed = True  # type: ignore[attr-defined]
        closed(self)

    def start(self: threading.Thread) -> None:
        begin(self)
        if self.name.startswith("move-"):
            reading.wait(5)
            raise KeyboardInterrupt

    def wait(self: threading.Condition, *args: Any, **kwargs: Any) -> Any:
        if left[0] and threading.current_thread() is threading.main_thread():
            left[0] -= 1
            raise KeyboardInterrupt
        return wait_for(self, *args, **kwargs)

    for kind, name, value in (
        (DirectorySource, "read", slow),
        (DirectorySource, "close", close),
        (threading.Thread, "start", start),
        (threading.Condition, "wait_for", wait),
    ):
        monkeypatch.setattr(kind, name, value)
    with pytest.raises(KeyboardInterrupt):
        run(conversion)
    monkeypatch.undo()
    assert reading.is_set()
    assert not left[0]
    assert not problems
    run(conversion)
    again = prepare(checkpoint("untied"), 2, output=tmp_path / "again")
    run(again)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "again")

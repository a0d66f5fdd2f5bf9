"""Nodes of a cluster: the same bytes, whichever of them is lost, and none takes part that sees other storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import msconv.stream.execute as streaming
import msconv.stream.movers.cluster as clusters
import msconv.stream.movers.ray as ray
import msconv.stream.movers.workers as workers
from msconv.cli import cli
from msconv.steps.conversion import run
from msconv.steps.reshard import prepare as prepare_reshard
from msconv.stream.outputs import RankFiles
from msconv.stream.task import Unit
from msconv_runtime.errors import BusyError, EnvironmentProblem, ResourceError, UsageError
from tests.checkpoints import read_tree
from tests.conftest import Checkpoints
from tests.conversions import convert, prepare
from tests.stream.clusters import Threads, nodes_of

pytestmark = pytest.mark.usefixtures("small_steps")


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of some kilobytes, and what was moved is journaled at once."""
    monkeypatch.setattr(clusters, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(workers, "LOOKS_EVERY_S", 0.05)
    monkeypatch.setattr("msconv.stream.movers.node.SHOWS_WITHIN_S", 0.0)
    monkeypatch.setattr(streaming, "CHECKPOINT_BYTES", 1)


@pytest.fixture
def whole(checkpoint: Checkpoints, tmp_path: Path) -> dict[str, bytes]:
    """What threads of one process make of it."""
    convert(checkpoint("untied"), tmp_path / "whole", 2)
    return read_tree(tmp_path / "whole")


def test_nodes_write_what_one_machine_writes(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    monkeypatch.chdir(tmp_path)  # nodes are somewhere else: no path of a task may be relative
    conversion = prepare(checkpoint("untied"), 2, output=Path("out"))
    cluster, progress, said = Threads(["a", "b", "c"]), list[int](), list[str]()
    done = run(conversion, progress=progress.append, mover=nodes_of(cluster, said))
    assert set(cluster.moved) == {"a", "b", "c"}
    assert len(cluster.moved) >= 9
    assert done.bytes_read == sum(progress) == conversion.plan.read_bytes
    assert read_tree(tmp_path / "out") == whole
    assert said == ["Nodes at work: 3, --jobs 1 each: machine a, machine b, machine c"]
    assert not cluster.alive
    assert not list((tmp_path / "out" / ".msconv").glob("shared-*"))


def test_nodes_reshard(checkpoint: Checkpoints, tmp_path: Path, whole: dict[str, bytes]) -> None:
    convert(checkpoint("untied"), tmp_path / "one", 1)
    run(prepare_reshard(tmp_path / "one", 2, output=tmp_path / "two"), mover=nodes_of(Threads(["a", "b"])))
    weights = {n: b for n, b in read_tree(tmp_path / "two").items() if n.startswith("weights/")}
    assert weights == {n: b for n, b in whole.items() if n.startswith("weights/")}


def test_what_a_lost_worker_did_is_done_elsewhere(
    checkpoint: Checkpoints, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    lost = list[Sequence[Unit]]()

    def dies(node: str, units: Sequence[Unit]) -> bool:
        if node == "a" and cluster.moved.count("a") == 1 and not lost:
            cluster.names.remove("a")  # its node too
            lost.append(units)
        return bool(lost) and node == "a"

    cluster, said = Threads(["a", "b"], dies=dies), list[str]()
    run(prepare(checkpoint("untied"), 2, output=tmp_path / "out"), mover=nodes_of(cluster, said))
    assert lost
    assert "machine a: its worker was lost (killed); what it did is done again." in said
    assert read_tree(tmp_path / "out") == whole


def test_a_node_whose_worker_was_lost_and_one_that_joins_get_workers(
    checkpoint: Checkpoints, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    def dies(node: str, units: Sequence[Unit]) -> bool:
        if len(cluster.moved) == 2 and "b" not in cluster.names:
            cluster.names.append("b")
            return True
        return False

    cluster = Threads(["a"], dies=dies)
    run(prepare(checkpoint("untied"), 2, output=tmp_path / "out"), mover=nodes_of(cluster))
    assert sorted(cluster.started) == ["a", "a", "b"]
    assert "b" in cluster.moved
    assert read_tree(tmp_path / "out") == whole


def test_units_that_end_every_worker_end_the_run_and_threads_go_on(
    checkpoint: Checkpoints, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "out")
    fatal = sorted(conversion.plan.units, key=lambda u: conversion.plan.sources[u[0]].offset)[-1]
    cluster = Threads(["a", "b"], dies=lambda node, units: fatal in units)
    with pytest.raises(ResourceError, match=r"3 workers ended while they moved it.* on machine [ab]: killed"):
        run(conversion, mover=nodes_of(cluster))
    assert not cluster.alive
    assert not (tmp_path / "out" / "READY").exists()
    done = run(conversion)
    assert done.resumed
    assert 0 < done.bytes_read < conversion.plan.read_bytes
    assert read_tree(tmp_path / "out") == whole


def test_a_node_with_other_storage_is_found_before_anything_is_written_or_deleted(
    checkpoint: Checkpoints, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    cluster = Threads(["a", "b"], sees={"b": tmp_path})
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "whole")
    with pytest.raises(ResourceError, match=r"1 of 2 nodes .*\n  machine b: its storage is not this machine's"):
        run(conversion, force=True, mover=nodes_of(cluster))
    assert not cluster.moved
    assert not cluster.alive
    assert read_tree(tmp_path / "whole") == whole


def test_a_node_with_another_checkpoint_is_found(own_checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = own_checkpoint("untied")
    conversion = prepare(model, 2, output=tmp_path / "out")
    os.utime(model / "model.safetensors")
    with pytest.raises(ResourceError, match=r"machine a: sees other source files: .*modified at another time"):
        run(conversion, mover=nodes_of(Threads(["a"])))
    assert not (tmp_path / "out" / "weights").exists()


def test_bytes_that_the_driver_does_not_see_are_never_journaled(
    checkpoint: Checkpoints, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "out")
    files = RankFiles(tmp_path / "out", 2, 1)

    def lose(node: str) -> None:
        if len(cluster.moved) == 3:
            with files.temporary(1, 0).open("r+b") as f:
                f.write(bytes(files.temporary(1, 0).stat().st_size))

    cluster = Threads(["a"], after=lose)
    with pytest.raises(ResourceError, match=r"this machine reads other bytes at .* than machine a wrote"):
        run(conversion, mover=nodes_of(cluster))
    lines = (tmp_path / "out" / ".msconv" / "journal.jsonl").read_text().splitlines()[1:]
    assert lines
    assert len(lines) < len(conversion.plan.units)
    run(conversion, force=True)
    assert read_tree(tmp_path / "out") == whole


def test_no_worker_anywhere_and_a_second_driver_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    conversion = prepare(checkpoint("untied"), 2, output=tmp_path / "out")
    with pytest.raises(EnvironmentProblem, match="No node of the cluster started a worker"):
        run(conversion, mover=nodes_of(Threads([])))

    def second(node: str) -> None:
        if len(cluster.moved) == 1:
            with pytest.raises(BusyError, match="is working on this directory"):
                run(conversion, mover=nodes_of(Threads(["z"])))

    cluster = Threads(["a"], after=second)
    run(conversion, mover=nodes_of(cluster))


@pytest.mark.parametrize("command", ["convert", "reshard"])
def test_without_ray_the_extra_is_named(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(ray, "find_spec", lambda name: None)
    convert(checkpoint("untied"), tmp_path / "one", 1)
    source = {"convert": checkpoint("untied"), "reshard": tmp_path / "one"}[command]
    arguments: list[Any] = [command, source, "--tp", 2, "--output", tmp_path / "out", "--ray", "local", "--json"]
    with pytest.raises(EnvironmentProblem, match="Ray is not installed") as caught:
        CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False, catch_exceptions=False)
    assert 'pip install "msconv[ray]"' in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:0", ":6379", "head:70000"])
def test_what_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(ray, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="neither local nor auto nor HOST:PORT"):
        ray.refuse_address(address)

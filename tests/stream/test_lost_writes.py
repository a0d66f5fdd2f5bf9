"""Disks that lose what was written and say so once: nothing that was lost is taken for done."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from tests.commands import run_command, run_msconv
from tests.every import EVERY
from tests.stream.crashes import FAULTS, faulty
from tests.stream.faults import SYNCING, Fault
from tests.synthetic import digests, qwen3_config, write_synthetic

pytestmark = pytest.mark.slow
MOST, FEWEST = (0, 15) if EVERY else (12, 10)  # syncs; `make test-crashes` takes all


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("tiny") / "tiny", qwen3_config(), shards=2)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lost") / "whole"
    assert run_msconv("convert", "--model", tiny, "--tp", 2, "--output", out).code == 0
    return out


def test_a_sync_that_fails_once_anywhere_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    spec = {"do": "lose", "times": 1, "begin": "nothing", "durable_every": 30000, "seed": seed, "jobs": [1, 3]}
    spec |= {"root": str(tmp_path / "sweep"), "most": MOST}
    line = [sys.executable, str(FAULTS), "--sweep", json.dumps(spec)]
    done = run_command([*line, "convert", "--model", str(tiny), "--tp", "1"], None, 120)
    assert done.code == 0, done.stderr
    assert not done.json["problems"], "\n".join(done.json["problems"])
    assert done.json["ended"] >= FEWEST
    steps = set(done.json["steps"])
    assert {"fdatasync model-rank-0-part-0.safetensors.tmp", "fdatasync journal.jsonl", "fsync weights"} <= steps


@pytest.mark.parametrize(("path", "at"), [("rank-0", 1), ("rank-1", 4), ("journal", 5)])
def test_after_a_failed_sync_nothing_more_is_recorded_as_done(
    tiny: Path, whole: Path, tmp_path: Path, path: str, at: int
) -> None:
    out = tmp_path / "out"
    options = ("convert", "--model", tiny, "--tp", 2, "--output", out, "--json")
    report = tmp_path / "steps"
    fault = Fault("lose", at, SYNCING, path, report=str(report))
    failed = faulty(fault, *options)
    assert failed.code == 5, failed.stderr
    assert path in failed.json["error"]["message"]
    assert "Input/output error" in failed.json["error"]["message"]
    assert "same command again" in failed.json["error"]["hint"]
    assert len(report.read_text().splitlines()) == at  # and no sync of this file was tried after it
    done = run_msconv(*options)
    assert done.code == 0, done.stderr
    assert done.json["resumed"] is (at > 1)
    assert digests(out) == digests(whole)


def test_a_name_that_may_be_lost_is_given_again(tiny: Path, whole: Path, tmp_path: Path) -> None:
    """READY is in place, and the sync of its directory fails: the next run does not take it as it is."""
    out = tmp_path / "out"
    options = ("convert", "--model", tiny, "--tp", 2, "--output", out, "--json")
    report = tmp_path / "steps"
    assert faulty(Fault("", 0, SYNCING, "/out", directories=True, report=str(report)), *options).code == 0
    names = report.read_text().splitlines()
    again = ("convert", "--model", tiny, "--tp", 2, "--output", out, "--force", "--json")
    failed = faulty(Fault("lose", len(names), SYNCING, "/out", directories=True), *again)
    assert failed.code == 5, failed.stderr
    before = (out / "READY").stat().st_mtime_ns
    done = run_msconv(*options)
    assert done.code == 0
    assert done.json["bytes_read"] == 0
    assert (out / "READY").stat().st_mtime_ns > before
    assert digests(out) == digests(whole)

"""File systems that lack something: syncs of directories, locks, names in UTF-8."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from msconv.checkpoint.hub_errors import explain
from tests.commands import run_msconv
from tests.conftest import Checkpoints
from tests.conversions import convert
from tests.stream.crashes import faulty
from tests.stream.faults import LOCKING, SYNCING, Fault
from tests.synthetic import digests


def test_where_directories_cannot_be_synced_the_work_is_done_and_that_is_said_once(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fault = Fault("EINVAL", 1, SYNCING, directories=True)
    done = faulty(fault, "convert", "--model", checkpoint("untied"), "--tp", 2, "--output", out)
    assert done.code == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "cannot sync directories" in line]
    assert len(said) == 1
    assert said[0].startswith("Warning: ")
    assert "Invalid argument" in said[0]
    convert(checkpoint("untied"), tmp_path / "whole", 2)
    assert digests(out) == digests(tmp_path / "whole")
    quiet = faulty(
        fault, "convert", "--quiet", "--force", "--model", checkpoint("untied"), "--tp", 2, "--output", out
    )
    assert (quiet.code, quiet.stderr) == (0, "")


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP"])
def test_where_there_are_no_locks_nothing_is_written(checkpoint: Checkpoints, tmp_path: Path, code: str) -> None:
    out = tmp_path / "out"
    options = ("convert", "--model", checkpoint("untied"), "--tp", 2, "--output", out, "--json")
    done = faulty(Fault(code, 1, LOCKING), *options)
    assert done.code == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert f"gives no locks (flock: {os.strerror(getattr(errno, code))})" in done.json["error"]["message"]
    assert "--output" in done.json["error"]["hint"]
    assert [p.name for p in out.rglob("*")] == [".msconv", "lock"]


def test_a_cache_without_locks_is_said_so() -> None:
    error = explain(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), "owner/name", "config.json")
    assert "gives no locks (No locks available)" in error.message
    assert "HF_HOME" in error.hint


def test_a_source_whose_name_is_not_utf8_is_refused_at_the_start(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"caf\xe9/model")
    shutil.copytree(checkpoint("untied"), model)
    for command in ("convert", "compile"):
        out = tmp_path / command
        options = ("--tp", 1, "--output", out, "--json")
        done = run_msconv(command, "--model", model, *options)
        assert done.code == 2, done.stderr
        assert "is not UTF-8" in done.json["error"]["message"]
        assert "Rename" in done.json["error"]["hint"]
        assert "caf\\udce9" in done.stderr
        assert not out.exists()
    plan = run_msconv("plan", "--model", model, "--tp", 1)
    assert plan.code == 0, plan.stderr


def test_an_output_whose_name_is_not_utf8_gets_the_same_bytes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"o\xfft")
    for line in (("convert", "--model", checkpoint("untied"), "--tp", 2, "--output", out), ("inspect", out)):
        done = run_msconv(*line)
        assert done.code == 0, done.stderr
    convert(checkpoint("untied"), tmp_path / "whole", 2)
    assert digests(out) == digests(tmp_path / "whole")
    assert run_msconv("reshard", out, "--tp", 1, "--output", tmp_path / "again").code == 0
    (out / ".msconv" / "source").unlink()
    lost = run_msconv("reshard", out, "--tp", 1, "--output", tmp_path / "lost", "--json")
    assert "is not UTF-8" in lost.json["error"]["message"]

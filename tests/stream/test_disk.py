"""Disks that are full, cannot be written, or hand out something else than before."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

import pytest

from tests.commands import Result, run_msconv
from tests.stream.crashes import FAULTS, faulty
from tests.stream.faults import WRITING, Fault
from tests.synthetic import digests, qwen3_config, write_synthetic

pytestmark = pytest.mark.slow

MB = 1_000_000
SPARE = 300_000  # journal, manifest, configuration, and what a file system needs for itself


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some megabytes of weights in two shards, and a tokenizer that is no small file."""
    config = qwen3_config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, vocab_size=2003, head_dim=64
    )
    directory = write_synthetic(tmp_path_factory.mktemp("disk") / "model", config, shards=2)
    (directory / "tokenizer.json").write_bytes(os.urandom(MB) + bytes(MB))
    return directory


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a conversion for two ranks ends in where nothing goes wrong."""
    out = tmp_path_factory.mktemp("disk") / "whole"
    assert run_msconv("convert", "--model", model, "--tp", 2, "--output", out).code == 0
    return out


def size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


# Small file systems


class Disk(Protocol):
    """A file system of chosen size, where `root` is its top."""

    root: Path

    def msconv(self, *arguments: object, fault: Fault | None = None) -> Result: ...

    def resize(self, size: int) -> None: ...

    def free(self) -> int: ...

    def fill(self, leave: int) -> None: ...

    def protect(self, read_only: bool) -> None: ...

    def digests(self, out: Path) -> dict[str, str]: ...

    def close(self) -> None: ...


class Simulated:
    """A directory; commands that write there see a disk that ends."""

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.size = root, size
        self.usual = Fault()

    def msconv(self, *arguments: object, fault: Fault | None = None) -> Result:
        return faulty(replace(fault or self.usual, capacity=self.size, target=str(self.root)), *arguments)

    def protect(self, read_only: bool) -> None:
        self.usual = Fault("EROFS", 1) if read_only else Fault()

    def resize(self, size: int) -> None:
        self.size = size

    def free(self) -> int:
        return self.size - sum(p.stat().st_blocks * 512 for p in self.root.rglob("*"))

    def fill(self, leave: int) -> None:
        (self.root / "other").write_bytes(os.urandom(self.free() - leave))

    def digests(self, out: Path) -> dict[str, str]:
        return digests(out)

    def close(self) -> None:
        pass


SERVER = """
import json, subprocess, sys
for line in sys.stdin:
    command = json.loads(line)
    done = subprocess.run(command, capture_output=True, text=True)
    print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)
"""
UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]


@cache
def can_mount() -> bool:
    """Whether a process of ours may mount a file system that only it sees."""
    try:
        trial = [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
        return subprocess.run(trial, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Tmpfs:
    """A real one, in a mount namespace of its own: it is gone with the process that holds it."""

    def __init__(self, root: Path, size: int) -> None:
        self.root = root
        server = [*UNSHARE, sys.executable, "-c", SERVER]
        self._server = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._succeed("mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(root))

    def run(self, *command: str) -> Result:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        assert select.select([self._server.stdout], [], [], 120)[0], command
        return Result(*json.loads(self._server.stdout.readline()))

    def _succeed(self, *command: str) -> str:
        done = self.run(*command)
        assert done.code == 0, done.stderr
        return done.stdout

    def msconv(self, *arguments: object, fault: Fault | None = None) -> Result:
        start = (str(FAULTS), fault.text()) if fault else ("-m", "msconv")
        return self.run(sys.executable, *start, *map(str, arguments))

    def resize(self, size: int) -> None:
        self._succeed("mount", "-o", f"remount,size={size}", str(self.root))

    def protect(self, read_only: bool) -> None:
        self._succeed("mount", "-o", "remount,ro" if read_only else "remount,rw", str(self.root))

    def free(self) -> int:
        code = "import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free)"
        return int(self._succeed(sys.executable, "-c", code, str(self.root)))

    def fill(self, leave: int) -> None:
        code = "import sys; open(sys.argv[1], 'wb').write(b'x' * int(sys.argv[2]))"
        self._succeed(sys.executable, "-c", code, str(self.root / "other"), str(self.free() - leave))

    def digests(self, out: Path) -> dict[str, str]:
        code = (
            f"import sys, json, pathlib; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
            "from tests.synthetic import digests; print(json.dumps(digests(pathlib.Path(sys.argv[1]))))"
        )
        found: dict[str, str] = json.loads(self._succeed(sys.executable, "-c", code, str(out)))
        return found

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(20)


DISKS: dict[str, Callable[[Path, int], Disk]] = {"simulated": Simulated}
if can_mount():
    DISKS["tmpfs"] = Tmpfs


@pytest.fixture(params=DISKS)
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    disks: list[Disk] = []

    def make(size: int) -> Disk:
        (tmp_path / "disk").mkdir()
        disks.append(DISKS[request.param](tmp_path / "disk", size // 4096 * 4096))
        return disks[0]

    yield make
    for disk in disks:
        disk.close()


def check_full(done: Result) -> int:
    """The command said that the disk is full, and how many bytes are missing: those."""
    assert "Traceback" not in done.stdout + done.stderr
    assert done.code == 5, done.stderr
    error = done.json["error"]
    assert error["code"] == "resource"
    assert "not enough disk" in error["message"]
    assert "same command again" in error["hint"]
    found = re.search(r"([\d,]+) are missing", error["message"])
    assert found, error["message"]
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("share", [0.05, 0.6, 0.98])
def test_a_disk_too_small_at_the_start_is_refused_with_what_is_missing(
    small_disk: Callable[[int], Disk], model: Path, whole: Path, share: float
) -> None:
    needed = size_of(whole)
    disk = small_disk(int(needed * share))
    before, out = disk.free(), disk.root / "out"
    options = ("convert", "--model", model, "--tp", 2, "--output", out, "--json")
    missing = check_full(disk.msconv(*options))
    assert missing == pytest.approx(needed - before, abs=SPARE)
    assert disk.free() > before - 50_000  # nothing was taken that could not be used
    assert not {"READY", "msconv.json"} & set(disk.digests(out))

    disk.resize(int(needed * share) + missing + SPARE)
    assert disk.msconv(*options).code == 0
    assert disk.digests(out) == digests(whole)


def test_a_disk_with_no_room_at_all_is_refused(
    small_disk: Callable[[int], Disk], model: Path, whole: Path
) -> None:
    disk = small_disk(MB)
    disk.fill(0)
    options = ("convert", "--model", model, "--tp", 2, "--output", disk.root / "out", "--json")
    assert check_full(disk.msconv(*options)) > 0
    disk.resize(size_of(whole) + MB + SPARE)
    assert disk.msconv(*options).code == 0
    assert disk.digests(disk.root / "out") == digests(whole)


def test_a_disk_with_room_for_the_weights_only_says_what_the_rest_needs(
    small_disk: Callable[[int], Disk], model: Path, whole: Path
) -> None:
    weights = size_of(whole / "weights")
    disk = small_disk(weights + SPARE)
    options = ("convert", "--model", model, "--tp", 2, "--output", disk.root / "out", "--json")
    missing = check_full(disk.msconv(*options))
    assert missing == pytest.approx(size_of(whole) - weights, abs=SPARE)
    assert not {"READY", "msconv.json"} & set(disk.digests(disk.root / "out"))
    disk.resize(weights + SPARE + missing + SPARE)
    assert disk.msconv(*options).code == 0
    assert disk.digests(disk.root / "out") == digests(whole)


def test_a_disk_that_fills_between_two_runs_resumes_when_there_is_room_again(
    small_disk: Callable[[int], Disk], model: Path, whole: Path
) -> None:
    disk = small_disk(size_of(whole) + MB)
    out = disk.root / "out"
    options = ("convert", "--model", model, "--tp", 2, "--output", out, "--json")
    assert disk.msconv(*options, fault=Fault("kill", 3, ("write",), "journal")).code == -signal.SIGKILL
    disk.fill(0)
    assert check_full(disk.msconv(*options)) > 0
    assert not {"READY", "msconv.json"} & set(disk.digests(out))
    disk.resize(size_of(whole) + MB + size_of(whole / "weights"))
    done = disk.msconv(*options)
    assert done.code == 0, done.stderr
    assert done.json["resumed"] is True
    assert disk.digests(out) == digests(whole)


def test_a_full_disk_does_not_disturb_what_is_finished(
    small_disk: Callable[[int], Disk], model: Path, whole: Path
) -> None:
    disk = small_disk(size_of(whole) + MB)
    options = ("convert", "--model", model, "--tp", 2, "--output", disk.root / "out", "--json")
    assert disk.msconv(*options).code == 0
    disk.fill(0)
    disk.msconv(*options)
    assert disk.digests(disk.root / "out") == digests(whole)
    assert disk.msconv("inspect", disk.root / "out", "--check", "--json").json["check"]["ok"] is True


STEPS = [
    ("mkdir", "", 1),
    ("posix_fallocate", "", 1),
    ("posix_fallocate", "", 2),
    ("pwrite", "", 1),
    ("pwrite", "", 40),
    ("write", "journal", 1),
    ("write", "journal", 9),
    ("fdatasync", "", 1),
    ("fdatasync", "", 30),
    ("fsync", "journal", 1),
    ("fsync", "tokenizer", 1),
    ("fsync", "msconv.json", 1),
    ("fsync", "READY", 1),
]


@pytest.mark.parametrize(
    ("code", "of", "path", "at"),
    [(code, *step) for code in ("ENOSPC", "EIO") for step in STEPS]
    + [(code, *step) for code in ("EDQUOT", "EROFS") for step in STEPS[2::4]],
)
def test_a_disk_that_fails_at_any_step_is_an_error_and_resumes(
    model: Path, whole: Path, tmp_path: Path, code: str, of: str, path: str, at: int
) -> None:
    out = tmp_path / "out"
    options = ("convert", "--model", model, "--tp", 2, "--output", out, "--json")
    done = faulty(Fault(code, at, (of,), path), *options)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.code == 5, done.stderr
    message, hint = done.json["error"]["message"], done.json["error"]["hint"]
    if code in ("ENOSPC", "EDQUOT"):
        assert "not enough disk" in message
        assert "resumes" in hint
    else:
        assert os.strerror(getattr(errno, code)) in message
        assert "--output" in hint
    assert not (out / "READY").exists()
    assert run_msconv(*options).code == 0
    assert digests(out) == digests(whole)


# Outputs that cannot be written


@pytest.mark.parametrize("place", ["file/out", "file/deep/er", "/proc/out", "/dev/null/out"])
def test_an_output_where_no_directory_can_be_is_said_so(model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    done = run_msconv("convert", "--model", model, "--tp", 2, "--output", tmp_path / place, "--json")
    assert "Traceback" not in done.stdout + done.stderr
    assert done.code in (2, 5), done.stderr
    assert place.rsplit("/", 1)[0] in done.json["error"]["message"]
    assert "--output" in done.json["error"]["hint"]
    assert (tmp_path / "file").read_text() == "mine"


def check_unwritable(done: Result) -> None:
    assert "Traceback" not in done.stdout + done.stderr
    assert done.code == 5, done.stderr
    assert done.json["error"]["code"] == "resource"
    assert "cannot be written: Read-only file system" in done.json["error"]["message"]
    assert "--output" in done.json["error"]["hint"]


@pytest.mark.parametrize("step", WRITING)
def test_an_output_that_becomes_read_only_is_said_so(model: Path, tmp_path: Path, step: str) -> None:
    options = ("convert", "--model", model, "--tp", 2, "--output", tmp_path / "out", "--json")
    check_unwritable(faulty(Fault("EROFS", 1, (step,)), *options))
    assert not (tmp_path / "out" / "READY").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_file_system_is_said_so(
    small_disk: Callable[[int], Disk], model: Path, whole: Path, begun: bool
) -> None:
    disk = small_disk(size_of(whole) + MB)
    options = ("convert", "--model", model, "--tp", 2, "--output", disk.root / "out", "--json")
    if begun:
        assert disk.msconv(*options, fault=Fault("kill", 30, ("pwrite",))).code == -signal.SIGKILL
    disk.protect(True)
    check_unwritable(disk.msconv(*options))
    disk.protect(False)
    assert disk.msconv(*options).code == 0
    assert disk.digests(disk.root / "out") == digests(whole)


# Sources that do not hold still


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "own"))


@pytest.mark.parametrize(("at", "jobs"), [(1, 3), (12, 1), (30, 3)])
@pytest.mark.parametrize("how", ["truncate", "touch", "rewrite", "swap", "unlink"])
def test_a_shard_that_changes_while_it_is_read_is_an_error(
    own: Path, tmp_path: Path, how: str, at: int, jobs: int
) -> None:
    shard, out = own / "model-00002-of-00002.safetensors", tmp_path / "out"
    options = ("convert", "--model", own, "--tp", 2, "--output", out, "--jobs", jobs, "--json")
    done = faulty(Fault(how, at, ("preadv",), target=str(shard)), *options)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.code == 1, done.stderr
    assert done.json["error"]["code"] == "checkpoint"
    assert shard.name in done.json["error"]["message"]
    assert not {"READY", "msconv.json"} & {p.name for p in out.iterdir()}
    if how == "truncate":  # and nothing is made of what is left
        assert run_msconv(*options).code == 1
    elif how != "unlink":
        refused = run_msconv(*options)
        assert refused.code == 1
        assert "--force" in refused.json["error"]["hint"]
        assert run_msconv(*options, "--force").code == 0
        assert run_msconv("convert", "--model", own, "--tp", 2, "--output", tmp_path / "new").code == 0
        assert digests(out) == digests(tmp_path / "new")


@pytest.mark.parametrize("at", [1, 20])
def test_a_source_that_cannot_be_read_is_an_error_and_resumes(
    model: Path, whole: Path, tmp_path: Path, at: int
) -> None:
    options = ("convert", "--model", model, "--tp", 2, "--output", tmp_path / "out", "--json")
    done = faulty(Fault("EIO", at, ("preadv",)), *options)
    assert done.code == 1, done.stderr
    assert done.json["error"]["code"] == "checkpoint"
    assert "Input/output error" in done.json["error"]["message"]
    assert ".safetensors" in done.json["error"]["message"]
    assert not (tmp_path / "out" / "READY").exists()
    assert run_msconv(*options).code == 0
    assert digests(tmp_path / "out") == digests(whole)


# Two at once


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_second_of_two_commands_names_the_first_and_leaves_it_alone(
    model: Path, whole: Path, tmp_path: Path, force: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    options = ["convert", "--model", str(model), "--tp", "2", "--output", str(out)]
    fault = Fault("sleep", 30, ("pwrite",), seconds=2)
    line = [sys.executable, str(FAULTS), fault.text(), *options]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "sleeping\n"
        second = run_msconv(*options, "--json", *force)
        assert first.poll() is None
        assert second.code == 1
        assert second.json["error"]["code"] == "busy"
        assert f"process {first.pid} " in second.json["error"]["message"]
        assert first.wait(60) == 0
    assert digests(out) == digests(whole)

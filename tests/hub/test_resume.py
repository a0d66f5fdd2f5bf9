"""Killed at any moment while it downloads and converts: the same bytes, and no shard comes whole twice."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Result, run_msconv
from tests.hub.conftest import NAME
from tests.hub.server import Fault, Hub
from tests.hub.test_pull import same

pytestmark = pytest.mark.slow

# `msconv` as it is, but durable every megabyte
DURABLE = """
import msconv.stream.execute as streaming
streaming.CHECKPOINT_BYTES = 1 << 20
from msconv.cli import main
main()
"""
HEADERS = 64 << 10  # read again by every run


def command(out: Path, *options: object) -> list[str]:
    line = ["convert", "--model", NAME, "--tp", "4", "--output", str(out), *map(str, options)]
    return [sys.executable, "-c", DURABLE, *line]


def shard_bytes(hub: Hub, shards: Path) -> dict[str, float]:
    """How many times each shard came, its header apart."""
    return {p.name: hub.served[p.name] / p.stat().st_size for p in shards.glob("model-*.safetensors")}


@pytest.mark.parametrize("options", [(), ("--delete-source-as-you-go",)])
def test_killed_ten_times_it_ends_with_the_same_bytes_and_no_shard_came_twice(
    hub: Hub, shards: Path, expected: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    hub.bytes_per_second = 12e6
    kills = attempt = 0
    while kills < 10:
        attempt += 1
        assert attempt < 10
        out = tmp_path / f"out-{attempt}"
        runs = 0
        while True:
            runs += 1
            process = subprocess.Popen(command(out, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                process.wait(rng.uniform(0.6, 1.4) if kills < 10 else 60)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
            words = process.communicate(timeout=60)[1].decode()
            assert process.returncode in (0, -signal.SIGKILL), words
            assert (process.returncode == 0) == (out / "READY").exists() or process.returncode
            if process.returncode == 0:
                break
        assert same(out, expected)
        for name, times in shard_bytes(hub, shards).items():
            size = (shards / name).stat().st_size
            assert times < 1.5 + runs * HEADERS / size, f"{name} came {times:.2f} times"
        hub.reset()
        shutil.rmtree(tmp_path / "home")


def test_a_download_goes_on_where_the_connection_was_cut(
    hub: Hub, shards: Path, expected: Path, tmp_path: Path, hasty: Callable[..., Result]
) -> None:
    hub.faults = [Fault("cut", "/stored/", times=20, after=400_000, to_the_end=True)]
    done = hasty("convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert same(tmp_path / "out", expected)
    assert hub.faults[0].times == 0
    for name, times in shard_bytes(hub, shards).items():
        assert times < 1.05 + HEADERS / (shards / name).stat().st_size


def test_a_stalled_download_is_noticed_and_goes_on(
    hub: Hub, expected: Path, tmp_path: Path, hasty: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    hub.faults = [Fault("silence", "/stored/", times=2, after=500_000, to_the_end=True)]
    started = time.monotonic()
    done = hasty("convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert time.monotonic() - started < 20  # the server would be silent for 60 s
    assert same(tmp_path / "out", expected)


def test_a_server_that_does_not_know_ranges_still_serves(
    hub: Hub, expected: Path, tmp_path: Path, hasty: Callable[..., Result]
) -> None:
    hub.faults = [
        Fault("cut", "/stored/", times=1, after=400_000, to_the_end=True),
        Fault("whole", "/stored/"),
    ]
    done = hasty("convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert same(tmp_path / "out", expected)


def test_what_a_crash_left_damaged_is_downloaded_anew(hub: Hub, expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_msconv("convert", "--model", NAME, "--tp", 4, "--output", out, "--dry-run")
    blobs = next((tmp_path / "home" / "hub").rglob("blobs"))
    from tests.hub.server import sha256

    shard = hub.repos[NAME].directory / "model-00005-of-00008.safetensors"
    (blobs / f"{sha256(shard)}.incomplete").write_bytes(bytes(1 << 20))  # as after a power cut
    done = run_msconv("convert", "--model", NAME, "--tp", 4, "--output", out)
    assert done.code == 0, done.stderr
    assert same(out, expected)


def test_shards_are_deleted_as_they_are_read_and_not_downloaded_again(
    hub: Hub, shards: Path, expected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hub.bytes_per_second = 12e6
    process = subprocess.Popen(command(out, "--delete-source-as-you-go"), stderr=subprocess.DEVNULL)
    own = out / ".msconv" / "downloads"
    gone: set[str] = set()
    seen: set[str] = set()
    while len(gone) < 3 and process.poll() is None:
        here = {p.name for p in own.glob("*.safetensors")} if own.is_dir() else set()
        seen |= here
        gone = seen - here
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(gone) >= 3
    for name in gone:
        assert not list(tmp_path.rglob(name))
    hub.reset()
    hub.bytes_per_second = 0
    done = run_msconv(*command(out, "--delete-source-as-you-go")[3:])
    assert done.code == 0, done.stderr
    assert same(out, expected)
    for name in gone:
        assert hub.served[name] <= HEADERS
    assert not own.exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_few_undeleted_shards_lie_on_the_disk_at_once(
    hub: Hub, tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = """
import sys
from pathlib import Path
import msconv.checkpoint.downloads as downloads
import msconv.stream.execute as streaming
streaming.CHECKPOINT_BYTES = 1 << 20
downloads.KEPT = 3
most, download = 0, downloads.Repository.download
def counted(self, name, *rest):
    global most
    if name.startswith("model-"):
        most = max(most, len([p for p in self.own.iterdir() if p.suffix != ".lock"]))
    return download(self, name, *rest)
downloads.Repository.download = counted
from msconv.cli import main
try:
    main()
finally:
    print(f"most {most}", file=sys.stderr)
"""
    from tests.commands import run_python

    options = ("convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out", "--jobs", 1)
    done = run_python(watched, *options, "--delete-source-as-you-go")
    assert done.code == 0, done.stderr
    assert int(done.stderr.split("most ")[1]) <= 4
    assert same(tmp_path / "out", expected)


def test_shards_of_the_users_cache_are_used_and_never_deleted(hub: Hub, tmp_path: Path, expected: Path) -> None:
    options = ("convert", "--model", NAME, "--tp", 4)
    assert run_msconv(*options, "--output", tmp_path / "first").code == 0
    hub.reset()
    done = run_msconv(*options, "--output", tmp_path / "out", "--delete-source-as-you-go")
    assert done.code == 0, done.stderr
    assert not hub.served
    assert len(list((tmp_path / "home").rglob("model-*.safetensors"))) == 8
    assert same(tmp_path / "out", expected)


def test_deleting_a_directory_as_you_go_is_refused(hub: Hub, shards: Path, tmp_path: Path) -> None:
    done = run_msconv(
        "convert", "--model", shards, "--tp", 4, "--output", tmp_path / "out", "--delete-source-as-you-go"
    )
    assert done.code == 2
    assert "is a directory" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_ends_at_once_and_resumes(
    hub: Hub, expected: Path, tmp_path: Path, how: signal.Signals
) -> None:
    hub.bytes_per_second = 4e6
    out = tmp_path / "out"
    process = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    while not hub.served["model-00002-of-00008.safetensors"] > 2 * HEADERS:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    started = time.monotonic()
    words = process.communicate(timeout=30)[1]
    assert process.returncode == 130, words
    assert time.monotonic() - started < 5
    assert "Traceback" not in words
    hub.bytes_per_second = 0
    done = run_msconv(*command(out)[3:])
    assert done.code == 0, done.stderr
    assert same(out, expected)


@pytest.mark.parametrize("path", ["/api/", "/stored/"])
def test_a_silent_server_does_not_keep_an_interrupted_command(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.faults = [Fault("silence", path)]
    process = subprocess.Popen(command(tmp_path / "out"), stderr=subprocess.PIPE, text=True)
    while not hub.asked(path):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    words = process.communicate(timeout=30)[1]
    assert process.returncode == 130, words
    assert "Traceback" not in words
    assert time.monotonic() - started < 6  # of the client's 2 s of patience, and a busy machine's


def test_other_weights_under_the_same_name_are_refused_and_named(hub: Hub, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.faults = [Fault("status", "/stored/Qwen/Qwen3-8B/", status=404, to_the_end=True)]
    assert run_msconv("convert", "--model", NAME, "--tp", 4, "--output", out).code == 1
    hub.faults = []
    other = Path(shutil.copytree(shards, tmp_path / "other"))
    path = other / "model-00004-of-00008.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    hub.add(NAME, other)
    done = run_msconv("convert", "--model", NAME, "--tp", 4, "--output", out)
    assert done.code == 1
    assert "source files" in done.stderr
    assert run_msconv("convert", "--model", NAME, "--tp", 4, "--output", out, "--force").code == 0

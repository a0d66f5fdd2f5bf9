"""Addresses: which are taken, what they may not carry, and a checkpoint that a web server has.  No package of a
store is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from msconv.checkpoint.store import Store
from msconv.checkpoint.store_errors import StoreError
from msconv.checkpoint.urls import checked_url, is_url
from msconv.location import open_reference
from msconv.stream import store_source
from msconv_runtime.errors import CheckpointError, UsageError
from tests.checkpoints import read_tree
from tests.commands import run_python
from tests.storage.conftest import hasty
from tests.storage.servers import Directory

# `msconv` where neither fsspec nor a driver is installed
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Blind(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in ("fsspec", "s3fs", "gcsfs")
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blind
from msconv.cli import main
main()
"""


@pytest.fixture
def web(shards: Path) -> Iterator[Directory]:
    server = Directory(shards.parent)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://me:geheim@bucket/model", "with a user or a password"),
        ("https://me:geheim@host/model", "with a user or a password"),
        ("https://host/model?token=geheim", "with a query"),
        ("https://host/model#geheim", "with a query"),
        ("s3://bucket/a::https://host/b", "several parts"),
        ("file://host/etc", "are not read"),
        ("ftp://host/model", "are not read"),
        ("s3://bucket/../model", "an empty part"),
        ("s3://bucket//model", "an empty part"),
        ("s3://bucket/mo*el", "wildcards"),
    ],
)
def test_an_address_that_is_not_taken_says_why_and_repeats_no_secret(url: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        open_reference(url)
    assert said in e.value.message
    assert "geheim" not in e.value.message + e.value.hint


def test_addresses_are_written_in_one_way() -> None:
    assert checked_url("memory://bucket/model/") == checked_url("memory:/bucket/model") == "memory://bucket/model"
    assert not any(
        map(
            is_url,
            ("models/Qwen3", "simplecache::s3://bucket/model", "Qwen/Qwen3-8B@main", "./a:b", "C:model", "/a/b"),
        )
    )


@pytest.mark.parametrize(
    ("url", "wanted"), [("s3://bucket/model", '"msconv[storage]"'), ("gs://bucket/model", '"msconv[storage]"')]
)
def test_a_missing_package_is_one_line(tmp_path: Path, url: str, wanted: str) -> None:
    done = run_python(WITHOUT, "convert", "--model", url, "--tp", 1, "--output", tmp_path / "out")
    assert done.code == 4 and wanted in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_web_server_gives_the_same_artifact(web: Directory, expected: Path, tmp_path: Path) -> None:
    seen = [0]

    def fault(method: str, path: str) -> str:
        seen[0] += method == "GET"
        return {5: "503", 9: "cut"}.get(seen[0] % 11, "") if method == "GET" else ""

    web.fault = fault
    done = hasty("convert", "--model", f"{web.url}/Qwen3-8B", "--tp", 2, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert read_tree(tmp_path / "out") == read_tree(expected)


def test_a_web_server_without_ranges_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_source, "BLOCK_BYTES", 64 << 10)
    server = Directory(shards.parent, has_ranges=False)
    try:
        with pytest.raises(StoreError, match="range requests"):
            open_checkpoint_and_read(f"{server.url}/Qwen3-8B")
    finally:
        server.close()


def open_checkpoint_and_read(url: str) -> None:
    location = open_reference(url)
    checkpoint = location.open_checkpoint()
    source = location.shards(checkpoint).open()
    info = max(checkpoint.tensors.values(), key=lambda t: t.offset + t.nbytes)
    source.read(info, 0, memoryview(bytearray(info.nbytes)))


def test_a_store_in_memory_is_read_and_its_changes_are_noticed(shards: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe_file(f"/models/Qwen3-8B/{path.name}", path.read_bytes())
    location = open_reference("memory://models/Qwen3-8B")
    checkpoint = location.open_checkpoint()
    here = open_reference(str(shards)).open_checkpoint()
    assert checkpoint.config_digest == here.config_digest and checkpoint.name == "Qwen3-8B"
    assert {n: (t.file, t.offset) for n, t in checkpoint.tensors.items()} == {
        n: (t.file, t.offset) for n, t in here.tensors.items()
    }
    source = location.shards(checkpoint).open()
    source.check_unchanged()
    name = next(iter(checkpoint.files))
    time.sleep(0.001)  # the store tells versions by time
    store.pipe_file(f"/models/Qwen3-8B/{name}", (shards / name).read_bytes())
    with pytest.raises(CheckpointError, match=f"{name}: changed while it was read"):
        source.check_unchanged()
    store.rm("/models", recursive=True)


def test_the_first_error_ends_all_downloads(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe_file(f"/models/Qwen3-8B/{path.name}", path.read_bytes())
    real, ranges = Store.read, [0]

    def read(self: Store, name: str, begin: int, end: int, cancelled: threading.Event) -> bytes:
        if not name.endswith(".safetensors"):
            return real(self, name, begin, end, cancelled)
        if "00002" in name:
            raise StoreError("gone", "")
        ranges[0] += 1
        time.sleep(0.01)
        return bytes(end - begin)

    monkeypatch.setattr(Store, "read", read)
    monkeypatch.setattr("msconv.checkpoint.store.RANGE_BYTES", 1000)
    with pytest.raises(StoreError, match="gone"):
        open_reference("memory://models/Qwen3-8B").bring()
    assert sum(p.stat().st_size for p in shards.glob("*.safetensors")) > 1000 * 1000
    assert ranges[0] < 100
    store.rm("/models", recursive=True)


def test_only_s3_takes_an_artifact_and_a_directory_is_served(tmp_path: Path) -> None:
    done = hasty("convert", "--model", tmp_path, "--tp", 1, "--output", "https://me:geheim@host/out")
    assert done.code == 2 and "uploaded to s3:// only" in done.stderr and "geheim" not in done.stderr
    done = hasty("serve", "s3://bucket/artifact")
    assert done.code == 2 and "a directory of this machine is needed" in done.stderr, done.stderr

"""What a download will take: bytes as the hub lists them, and a rate that is tried and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.interface import fields
from tests.cli.test_interface import frozen_fields
from tests.commands import run_msconv
from tests.hub.conftest import NAME
from tests.hub.server import Hub

pytestmark = pytest.mark.slow


def test_a_download_is_tried_with_ranges_and_leaves_no_shard(hub: Hub, shards: Path, tmp_path: Path) -> None:
    done = run_msconv("plan", NAME, "--tp", 4, "--output", tmp_path / "out", "--predict", "--json")
    assert done.code == 0, done.stderr
    download = done.json["download"]
    assert download["read_bytes"] == sum(p.stat().st_size for p in shards.glob("model*.safetensors"))
    assert download["read_bytes"] == done.json["download_bytes"]
    (kind,) = download["kinds"]
    assert kind["per_s"] > 0
    assert download["startup_s"] == 0  # the command that downloads has begun
    found = {f for f in fields(done.json) if f.startswith("download")}
    assert found <= frozen_fields()["msconv plan --predict --target"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not list((tmp_path / "home").rglob(".msconv-sample*"))


def test_what_is_here_is_not_predicted(hub: Hub, shards: Path, tmp_path: Path) -> None:
    done = run_msconv("plan", shards, "--tp", 4, "--output", tmp_path / "out", "--predict")
    assert done.code == 0, done.stderr
    assert "nothing: the source is here" in done.stdout
    assert not hub.asked("resolve")

"""A checkpoint in a store: converted to the same bytes as from a directory, whatever the store does meanwhile."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.checkpoints import read_tree
from tests.storage.conftest import BUCKET, HASTY, NAME, hasty
from tests.storage.servers import Proxy

URL = f"s3://{BUCKET}/{NAME}"


def convert(url: str, out: Path, *more: object) -> str:
    done = hasty("convert", "--model", url, "--tp", 2, "--output", out, *more)
    assert done.code == 0, done.stderr
    return done.stderr + done.stdout


def test_the_artifact_is_the_same_as_from_a_directory(
    s3: Proxy, expected: Path, tmp_path: Path, home: Path
) -> None:
    said = convert(URL, tmp_path / "out")
    assert read_tree(tmp_path / "out") == read_tree(expected)
    assert (tmp_path / "out/.msconv/source").read_text().strip() == URL
    copied = {p.name for p in home.rglob("*") if p.is_file() and p.suffix != ".lock"}
    assert copied == {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    asked = {path for _, path in s3.requests}
    assert not [path for path in asked if path.endswith((".py", ".bin", ".md"))]
    assert "not-to-be-seen" not in said
    again = hasty("convert", "--model", URL, "--tp", 2, "--output", tmp_path / "out")
    assert again.code == 0 and "Already complete" in again.stderr + again.stdout


def test_a_store_that_throttles_and_cuts_answers_off_gives_the_same_bytes(
    s3: Proxy, expected: Path, tmp_path: Path
) -> None:
    seen = Counter[str]()

    def fault(method: str, path: str) -> str:
        seen["all"] += 1
        kind = {3: "busy", 6: "cut", 9: "refused", 12: "lost"}.get(seen["all"] % 13, "")
        seen[kind] += 1
        return kind

    s3.fault = fault
    convert(URL, tmp_path / "out")
    assert read_tree(tmp_path / "out") == read_tree(expected)
    assert all(seen[kind] for kind in ("busy", "cut", "refused", "lost"))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_conversion_that_is_killed_resumes(s3: Proxy, expected: Path, tmp_path: Path, share: float) -> None:
    """Killed after so much of the requests of a whole conversion."""
    convert(URL, tmp_path / "whole")
    most = int(len(s3.requests) * share)
    s3.requests.clear()
    s3.fault = lambda method, path: time.sleep(0.02) or ""  # type: ignore[func-returns-value]
    out = tmp_path / "out"
    code = "import msconv.stream.execute as e; e.CHECKPOINT_BYTES = 1" + HASTY
    command = [sys.executable, "-c", code, "convert", "--model", URL, "--tp", "2", "--output", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(s3.requests) < most and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    assert not (out / "READY").exists()
    s3.fault = lambda method, path: ""
    convert(URL, out)
    assert read_tree(out) == read_tree(expected)


def test_a_file_that_changes_while_it_is_read_is_noticed(s3: Proxy, shards: Path, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{s3.upstream.netloc}")
    path = next(p for p in sorted(shards.iterdir()) if p.suffix == ".safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    reads = Counter[str]()

    def fault(method: str, asked: str) -> str:
        reads[asked] += path.name in asked
        if reads[asked] == 3:
            client.put_object(Bucket=BUCKET, Key=f"{NAME}/{path.name}", Body=bytes(data))
        return ""

    s3.fault = fault
    done = hasty("convert", "--model", URL, "--tp", 2, "--output", tmp_path / "out")
    assert done.code == 1 and f"{URL}/{path.name}: changed while it was read" in done.stderr, done.stderr
    assert not (tmp_path / "out/READY").exists()


def test_plan_lint_and_a_dry_run_take_an_address(s3: Proxy, shards: Path, tmp_path: Path) -> None:
    planned = hasty("plan", URL, "--tp", 2, "--json").json
    local = hasty("plan", shards, "--tp", 2, "--json").json
    same = ("model", "parameters", "source_bytes", "output_bytes", "ranks")
    assert {k: planned[k] for k in same} == {k: local[k] for k in same}
    assert planned["download_bytes"] == 0
    linted, there = hasty("lint", URL, "--json").json, hasty("lint", shards, "--json").json
    for found in (linted, there):  # "the first" that a check saw depends on threads
        found["findings"] = [{**f, "problem": ""} for f in found["findings"]]
    assert linted["findings"] == there["findings"] and linted["bytes_read"] == there["bytes_read"]
    dry = hasty("convert", URL, "--tp", 2, "--output", tmp_path / "out", "--dry-run")
    assert dry.code == 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "said", "code"),
    [
        ("busy", "too many requests (SlowDown)", 1),
        ("forbidden", "does not allow to read it (AccessDenied)", 1),
        ("refused", "the connection failed", 1),
    ],
)
def test_a_store_that_refuses_is_one_message(s3: Proxy, tmp_path: Path, kind: str, said: str, code: int) -> None:
    def fault(method: str, path: str) -> str:
        return kind if "model-0" in path and method == "GET" and len(s3.requests) > 20 else ""

    s3.fault = fault
    done = hasty("convert", "--model", URL, "--tp", 2, "--output", tmp_path / "out")
    assert done.code == code and said in done.stderr, done.stderr
    assert done.stderr.count("\nError: ") == 1 and "Traceback" not in done.stderr
    assert "not-to-be-seen" not in done.stderr and "AKIA" not in done.stderr
    assert not (tmp_path / "out/READY").exists()
    s3.fault = lambda method, path: ""
    convert(URL, tmp_path / "out")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://no-such-bucket/Qwen3-8B", "there is no such bucket"),
        (f"s3://{BUCKET}/nothing", "is not there"),
        (f"s3://{BUCKET}", "has no config.json"),
    ],
)
def test_a_wrong_address_is_one_message(s3: Proxy, tmp_path: Path, url: str, said: str) -> None:
    done = hasty("convert", "--model", url, "--tp", 2, "--output", tmp_path / "out")
    assert done.code == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def make_public(s3: Proxy) -> None:
    import boto3

    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    client = boto3.client("s3", endpoint_url=f"http://{s3.upstream.netloc}", **keys)
    client.put_bucket_acl(Bucket=BUCKET, ACL="public-read")
    for entry in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
        client.put_object_acl(Bucket=BUCKET, Key=entry["Key"], ACL="public-read")


def test_without_credentials_it_says_how_to_give_them(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    done = hasty("convert", "--model", URL, "--tp", 2, "--output", tmp_path / "out")
    assert done.code == 1 and "no credentials were found" in done.stderr and "AWS_PROFILE" in done.stderr, (
        done.stderr
    )
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    make_public(s3)
    convert(URL, tmp_path / "out")


def test_memory_does_not_grow_with_the_model(s3: Proxy, tmp_path: Path) -> None:
    planned = hasty("convert", URL, "--tp", 2, "--output", tmp_path / "out", "--dry-run", "--json").json
    done = hasty("convert", URL, "--tp", 2, "--output", tmp_path / "out", "--json").json
    assert done["peak_rss_bytes"] <= planned["peak_memory_bytes"]
    low = hasty("convert", URL, "--tp", 2, "--output", tmp_path / "low", "--max-memory", "100M")
    assert low.code == 5 and "--max-memory" in low.stderr


def test_a_source_travels_as_a_value(s3: Proxy, shards: Path) -> None:
    from msconv.location import open_reference
    from msconv.stream.source import DirectoryShards

    location = open_reference(URL)
    checkpoint = location.open_checkpoint()
    value = pickle.dumps(location.shards(checkpoint))
    assert b"not-to-be-seen" not in value
    source = pickle.loads(value).open()
    here = open_reference(str(shards)).open_checkpoint()
    local = DirectoryShards(here.files).open()
    for name, info in sorted(checkpoint.tensors.items())[:20]:
        ours, theirs = bytearray(info.nbytes), bytearray(info.nbytes)
        source.read(info, 0, memoryview(ours))
        local.read(here.tensors[name], 0, memoryview(theirs))
        assert ours == theirs
    source.close()
    local.close()

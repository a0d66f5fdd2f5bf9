"""An artifact that is converted into a store: the same bytes as in a directory, killed and resumed, and nothing
that looks whole before it is."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import read_tree
from tests.commands import Result, run_python
from tests.storage.conftest import BUCKET, HASTY, NAME
from tests.storage.servers import Proxy

PREFIX = "artifacts/Qwen3-8B-tp2"
SOURCE, URL = f"s3://{BUCKET}/{NAME}", f"s3://{BUCKET}/{PREFIX}"
SMALL_PARTS = "import msconv.share.upload as u; u.PART_BYTES = 256 << 10\n" + HASTY

Objects = Callable[[], dict[str, bytes]]


@pytest.fixture
def client(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store without the proxy."""
    import boto3

    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1 << 10)
    return boto3.client("s3", endpoint_url=f"http://{s3.upstream.netloc}")


@pytest.fixture
def stored(client: Any) -> Objects:
    def read() -> dict[str, bytes]:
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=PREFIX + "/").get("Contents", ())
        names = [o["Key"] for o in found]
        return {
            name.removeprefix(PREFIX + "/"): client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
            for name in names
        }

    return read


def promised(objects: dict[str, bytes]) -> dict[str, bytes]:
    return {n: b for n, b in objects.items() if not n.startswith(".msconv") and n != "report.html"}


def convert(source: object, *more: object, tp: int = 2, code: str = SMALL_PARTS) -> Result:
    return run_python(code, "convert", "--model", source, "--tp", tp, "--output", URL, *more)


def test_the_artifact_is_the_same_as_in_a_directory(
    s3: Proxy, stored: Objects, expected: Path, home: Path
) -> None:
    done = convert(SOURCE, "--json")
    assert done.code == 0, done.stderr
    assert done.json["artifact"] == URL
    assert promised(stored()) == read_tree(expected)
    assert not [p for p in (home / "uploads").rglob("*") if p.is_file()]  # nothing is left here
    writes = [path for method, path in s3.requests if method in ("PUT", "POST")]
    assert writes[-1].endswith("/READY") and writes[-2].endswith("/msconv.json")
    for data in stored().values():
        assert b"not-to-be-seen" not in data and b"AKIA" not in data
    s3.requests.clear()
    again = convert(SOURCE)
    assert again.code == 0 and "Already complete" in again.stderr + again.stdout
    assert not [m for m, path in s3.requests if m == "PUT"]


def test_faults_of_the_store_change_no_byte(s3: Proxy, stored: Objects, shards: Path, expected: Path) -> None:
    seen = Counter[str]()

    def fault(method: str, path: str) -> str:
        seen["all"] += 1
        kind = {2: "busy", 4: "refused", 6: "lost"}.get(seen["all"] % 7, "")
        seen[kind] += 1
        return kind

    s3.fault = fault
    done = convert(shards)
    assert done.code == 0, done.stderr
    assert promised(stored()) == read_tree(expected)
    assert all(seen[kind] for kind in ("busy", "refused", "lost"))


def is_upload(method: str, path: str) -> bool:
    return method in ("PUT", "POST") and PREFIX in path and "probe" not in path


@pytest.mark.parametrize("after", [1, 5, 14, 24, 32, 36])
def test_a_killed_upload_resumes_and_sends_no_part_twice(
    s3: Proxy, stored: Objects, shards: Path, expected: Path, after: int
) -> None:
    """Killed with so many requests of the upload answered, and one more on its way."""
    count = Counter[str]()

    def fault(method: str, path: str) -> str:
        count["upload"] += is_upload(method, path)
        if count["upload"] > after and is_upload(method, path):
            time.sleep(60)
            return "refused"  # the store never hears of it, also not later
        return ""

    s3.fault = fault
    command = [sys.executable, "-c", SMALL_PARTS, "convert", "--model", str(shards), "--tp", "2", "--output", URL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while count["upload"] <= after and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)  # those beside it are answered
    assert process.poll() is None, process.communicate()
    process.kill()
    assert process.wait() == -9
    assert "READY" not in stored()
    sent = Counter(path for m, path in s3.requests if m == "PUT" and "partNumber" in path)
    s3.requests.clear()
    s3.fault = lambda method, path: ""
    done = convert(shards, "--json")
    assert done.code == 0, done.stderr
    assert done.json["bytes_read"] == 0  # nothing was converted again
    assert promised(stored()) == read_tree(expected)
    again = Counter(path for m, path in s3.requests if m == "PUT" and "partNumber" in path)
    unanswered = 3  # at a time
    assert len(sent.keys() & again.keys()) <= unanswered


def test_a_conversion_that_is_killed_before_its_upload_resumes(s3: Proxy, stored: Objects, expected: Path) -> None:
    s3.fault = lambda method, path: time.sleep(0.05) or ""  # type: ignore[func-returns-value]
    code = "import msconv.stream.execute as e; e.CHECKPOINT_BYTES = 1\n" + SMALL_PARTS
    command = [sys.executable, "-c", code, "convert", "--model", SOURCE, "--tp", "2", "--output", URL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len([p for _, p in s3.requests if "model-0" in p]) < 25 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and not stored()
    s3.fault = lambda method, path: ""
    done = convert(SOURCE, "--json")
    assert done.code == 0, done.stderr
    assert done.json["resumed"]
    assert promised(stored()) == read_tree(expected)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("busy", "too many requests (SlowDown)"), ("forbidden", "does not allow to write to it (AccessDenied)")],
)
def test_a_store_that_refuses_to_be_written_is_one_message(
    s3: Proxy, stored: Objects, shards: Path, expected: Path, kind: str, said: str
) -> None:
    s3.fault = lambda method, path: kind if method in ("PUT", "POST") else ""
    done = convert(shards)
    assert done.code == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "not-to-be-seen" not in done.stderr
    assert not stored()
    s3.fault = lambda method, path: kind if "part-0" in path and "partNumber=3" in path else ""
    done = convert(shards)
    assert done.code == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "READY" not in stored()
    s3.fault = lambda method, path: ""
    assert convert(shards).code == 0
    assert promised(stored()) == read_tree(expected)


def test_what_is_not_ours_is_not_touched(client: Any, stored: Objects, shards: Path) -> None:
    client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/thesis.pdf", Body=b"years")
    done = convert(shards, "--force")
    assert done.code == 2 and "thesis.pdf" in done.stderr, done.stderr
    assert stored() == {"thesis.pdf": b"years"}


def test_another_artifact_is_replaced_with_force_alone(
    s3: Proxy, stored: Objects, shards: Path, expected: Path
) -> None:
    assert convert(shards, tp=1).code == 0
    before = stored()
    done = convert(shards)
    assert done.code == 1 and "holds another artifact" in done.stderr, done.stderr
    assert stored() == before
    s3.requests.clear()
    assert convert(shards, "--force").code == 0
    changes = [(m, p) for m, p in s3.requests if m in ("PUT", "DELETE") and "probe" not in p]
    assert changes[0] == ("DELETE", f"/{BUCKET}/{PREFIX}/READY")  # before any byte of it changes
    assert promised(stored()) == read_tree(expected)


def test_a_store_that_keeps_other_bytes_is_found_out(
    s3: Proxy, client: Any, stored: Objects, shards: Path
) -> None:
    """One bit of a rank file changes before it is looked at."""
    done_once = Counter[str]()

    def fault(method: str, path: str) -> str:
        if method == "HEAD" and "rank-0-part-0" in path and not done_once["head"]:
            done_once["head"] += 1
            key = path.removeprefix(f"/{BUCKET}/")
            data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
            data[-1] ^= 1
            client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
        return ""

    s3.fault = fault
    done = convert(shards)
    assert done.code == 1 and "other bytes than were sent" in done.stderr, done.stderr
    assert "READY" not in stored() and "weights/model-rank-0-part-0.safetensors" not in stored()


def test_a_store_whose_digests_are_none_of_bytes_is_read_back(
    s3: Proxy, stored: Objects, shards: Path, expected: Path
) -> None:
    """As where a store encrypts with keys of its own."""
    other = hashlib.md5(b"encrypted").hexdigest()
    code = f"import msconv.share.upload as u\nu._joined = lambda digests: '{other}-9'\n" + SMALL_PARTS
    done = convert(shards, code=code)
    assert done.code == 0, done.stderr
    reads = [path for method, path in s3.requests if method == "GET" and "rank-1-part-0" in path]
    assert len(reads) > 9
    assert promised(stored()) == read_tree(expected)


def test_serving_needs_a_directory(s3: Proxy, shards: Path) -> None:
    for command in (("serve", URL), ("verify", URL), ("reshard", URL, "--tp", "1", "--output", "x")):
        done = run_python(HASTY, *command)
        assert done.code == 2 and "a directory of this machine is needed" in done.stderr, done.stderr

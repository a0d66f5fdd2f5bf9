"""A checkpoint, the artifact that converting it from a directory gives, and a store that speaks S3."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Result, run_msconv, run_python
from tests.storage.servers import Proxy
from tests.synthetic import qwen3_config, write_synthetic

BUCKET = "models"
NAME = "Qwen3-8B"

# `msconv` as it is, but less patient with a store that fails, and with smaller pieces
HASTY = """
import msconv.checkpoint.store_errors as errors
errors.FIRST_WAIT_S = 0.01
import msconv.stream.store_source as source
source.BLOCK_BYTES = 256 << 10
from msconv.cli import main
main()
"""


def hasty(*args: object) -> Result:
    return run_python(HASTY, *args)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint of 6 MB in 4 shards, among files that nobody needs.  To be read, never changed."""
    config = qwen3_config(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=1000,
    )
    model = write_synthetic(tmp_path_factory.mktemp("store") / NAME, config, shards=4)
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    (model / "generation_config.json").write_text("{}")
    for name in ("modeling_qwen3.py", "pytorch_model.bin", "README.md"):
        (model / name).write_text("not needed")
    return model


@pytest.fixture(scope="session")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact for two ranks, converted from the directory."""
    out = tmp_path_factory.mktemp("expected") / "out"
    done = run_msconv("convert", "--model", shards, "--tp", 2, "--output", out)
    assert done.code == 0, done.stderr
    return out


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What commands copy here goes to a directory of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "msconv"


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of a store that speaks S3, empty."""
    server = pytest.importorskip("moto.server", reason="`make test-storage` makes the environment that has it")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    store = server.ThreadedMotoServer(port=0)
    store.start()
    _, port = store.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    store.stop()


@pytest.fixture
def s3(moto: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the store, which has the checkpoint as s3://models/Qwen3-8B; commands use it."""
    import boto3

    for key in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "FSSPEC_S3_ANON"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen-anywhere")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", endpoint_url=moto)
    client.create_bucket(Bucket=BUCKET)
    for path in shards.iterdir():
        client.upload_file(str(path), BUCKET, f"{NAME}/{path.name}")
    proxy = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()
    for upload in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    while found := client.list_objects_v2(Bucket=BUCKET).get("Contents"):
        client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": o["Key"]} for o in found]})
    client.delete_bucket(Bucket=BUCKET)

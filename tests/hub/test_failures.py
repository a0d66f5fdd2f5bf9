"""Everything that goes wrong between here and a hub: each ends with a sentence, an exit code and, where bytes had
come, something to go on with."""

from __future__ import annotations

import errno
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Result, run_msconv, run_python
from tests.hub.conftest import HASTY, NAME
from tests.hub.server import Fault, Hub
from tests.hub.test_pull import same

pytestmark = pytest.mark.slow

SHARD = "model-00005-of-00008.safetensors"
Run = Callable[..., Result]


@pytest.fixture
def pull(hasty: Run, tmp_path: Path) -> Run:
    """`pull(model)`: convert it to `out`."""
    return lambda model=NAME, *options: hasty(
        "convert", "--model", model, "--tp", 4, "--output", tmp_path / "out", *options
    )


def refused(done: Result, code: int, *words: str) -> None:
    """It ended with this code, these words, a hint, and no traceback."""
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "fault in msconv" not in done.stderr
    for word in (*words, "Next: "):
        assert word in done.stderr, done.stderr


def goes_on(hub: Hub, pull: Run, out: Path, expected: Path, but: str = "") -> None:
    """Without the fault the same command finishes, and takes up what had come of all shards `but` one."""
    hub.faults = []
    before = dict(hub.served)
    done = pull()
    assert done.code == 0, done.stderr
    assert same(out, expected)
    for path in hub.repos[NAME].directory.glob("model-*"):
        if path.name != but and before.get(path.name, 0) >= path.stat().st_size + (64 << 10):
            assert hub.served[path.name] - before[path.name] < 1 << 20, f"{path.name} came again"


def test_a_name_that_does_not_exist_is_answered_with_near_ones(hub: Hub, pull: Run, tmp_path: Path) -> None:
    refused(pull("Qwen/Qwen3-9B"), 2, "Qwen/Qwen3-9B", "no such model", "Qwen/Qwen3-8B", "HF_TOKEN")
    refused(pull("qwen/qwen3-8b"), 2, "Qwen/Qwen3-8B")
    refused(pull("deepseek/DeepSeek-V4"), 2, "deepseek-ai/DeepSeek-V3")
    hub.add("someone/Zebra-7B-instruct", tmp_path)
    refused(pull("else/Zebra-7B"), 2, "someone/Zebra-7B-instruct")  # as the hub's search says
    assert not (tmp_path / "out").exists()


def test_a_private_repository_is_told_from_a_missing_one_only_by_a_token(hub: Hub, pull: Run) -> None:
    hub.repos[NAME].private = True
    refused(pull(), 2, "private", "HF_TOKEN")


def test_a_gated_repository_says_where_to_accept_its_licence(hub: Hub, pull: Run) -> None:
    hub.repos[NAME].gated = True
    refused(pull(), 1, "gated", "HTTP 401", f"{hub.url}/{NAME}", "HF_TOKEN")


def test_a_gated_repository_whose_licence_was_not_accepted(
    hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.faults = [Fault("status", "/resolve/", status=403, headers={"X-Error-Code": "GatedRepo"})]
    refused(pull(), 1, "gated", "HTTP 403", "Accept it at")


def test_a_wrong_token_is_said_to_be_wrong(hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = pull()
    refused(done, 1, "refused the token", "HTTP 401")
    assert "hf_wrong" not in done.stderr


@pytest.mark.parametrize("path", ["/api/", "/resolve/", "/stored/"])
@pytest.mark.parametrize("status", [401, 403, 418])
def test_a_refusal_names_its_status(hub: Hub, pull: Run, path: str, status: int) -> None:
    hub.faults = [Fault("status", path, status=status)]
    refused(pull(), 1, f"HTTP {status}", NAME)


def test_a_revision_that_does_not_exist(hub: Hub, pull: Run) -> None:
    refused(pull(f"{NAME}@v9"), 2, f"{NAME}@v9", "no such revision")


def test_a_shard_that_is_listed_and_not_there(
    hub: Hub, pull: Run, shards: Path, expected: Path, tmp_path: Path
) -> None:
    gone = {"X-Error-Code": "EntryNotFound"}
    hub.faults = [Fault("status", f"/resolve/{hub.repos[NAME].commit}/{SHARD}", status=404, headers=gone)]
    refused(pull(), 1, SHARD, "not in the repository")
    goes_on(hub, pull, tmp_path / "out", expected)


def test_a_shard_that_the_index_names_and_the_repository_lacks(
    hub: Hub, pull: Run, shards: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(shards, tmp_path / "other"))
    (other / SHARD).unlink()
    hub.add("some/holes", other)
    refused(pull("some/holes"), 1, SHARD, "model.safetensors.index.json")


def test_too_many_requests_are_waited_out_as_long_as_the_server_asks(
    hub: Hub, pull: Run, expected: Path, tmp_path: Path
) -> None:
    hub.faults = [Fault("status", "/stored/", times=1, status=429, headers={"Retry-After": "2"}, to_the_end=True)]
    started = time.monotonic()
    done = pull()
    assert done.code == 0, done.stderr
    assert time.monotonic() - started > 2
    assert same(tmp_path / "out", expected)


def test_a_server_that_asks_to_wait_for_an_hour_is_not_waited_for(
    hub: Hub, pull: Run, expected: Path, tmp_path: Path
) -> None:
    fault = Fault("status", f"/stored/{NAME}", status=429, headers={"Retry-After": "3600"}, to_the_end=True)
    hub.faults = [fault]
    refused(pull(), 1, "HTTP 429", "wait 3600 s")
    goes_on(hub, pull, tmp_path / "out", expected)


@pytest.mark.parametrize("path", ["/api/", "/resolve/", "/stored/"])
@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_failing_server_is_asked_some_times_and_no_more(
    hub: Hub, pull: Run, expected: Path, tmp_path: Path, path: str, status: int
) -> None:
    hub.faults = [Fault("status", path, status=status)]
    refused(pull(), 1, f"HTTP {status}", "several times")
    assert len(hub.asked(path)) <= 8 * 6
    hub.faults = [Fault("status", path, status=status, times=3)]
    assert pull().code == 0
    assert same(tmp_path / "out", expected)


def test_a_shard_whose_connection_is_always_cut_ends_the_conversion(
    hub: Hub, pull: Run, expected: Path, tmp_path: Path
) -> None:
    hub.faults = [Fault("cut", f"/stored/{NAME}/{hub.repos[NAME].commit}/{SHARD}", after=0, to_the_end=True)]
    refused(pull(), 1, SHARD, "connection")
    goes_on(hub, pull, tmp_path / "out", expected)


def test_no_thread_is_left_when_a_download_fails(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("cut", f"/stored/{NAME}/{hub.repos[NAME].commit}/{SHARD}", after=0, to_the_end=True)]
    code = f"""
import threading
try:
    {HASTY.strip().replace(chr(10), chr(10) + "    ")}
finally:
    print([t.name for t in threading.enumerate()])
"""
    done = run_python(code, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    refused(done, 1, SHARD)
    assert done.stdout == "['MainThread']\n"


def test_a_damaged_shard_is_refused_and_not_kept(
    hub: Hub, pull: Run, shards: Path, expected: Path, tmp_path: Path
) -> None:
    hub.faults = [Fault("damage", f"/stored/{NAME}/{hub.repos[NAME].commit}/{SHARD}", after=1_000_000)]
    refused(pull(), 1, SHARD, "digest")
    assert not list((tmp_path / "home").rglob(SHARD))
    assert not (tmp_path / "out" / "READY").exists()
    goes_on(hub, pull, tmp_path / "out", expected, but=SHARD)


def test_a_damaged_configuration_is_refused(hub: Hub, pull: Run) -> None:
    hub.faults = [Fault("damage", "config.json", after=3)]
    refused(pull(), 1, "config.json", "digest")


def test_more_bytes_than_were_announced_are_refused(hub: Hub, pull: Run) -> None:
    hub.faults = [Fault("extra", f"/stored/{NAME}/{hub.repos[NAME].commit}/{SHARD}", to_the_end=True)]
    refused(pull(), 1, SHARD, "more came")


def test_a_header_that_lies_is_refused_before_anything_is_downloaded(
    hub: Hub, pull: Run, shards: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(shards, tmp_path / "other"))
    data = (other / SHARD).read_bytes()
    (other / SHARD).write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
    hub.add("some/liar", other)
    refused(pull("some/liar"), 1, SHARD, str(1 << 40))
    assert sum(hub.served[p.name] for p in other.glob("model-*")) <= 8 * (64 << 10)


def test_a_shard_with_another_header_than_was_planned_with_is_refused(hub: Hub, tmp_path: Path) -> None:
    code = f"""
import msconv.checkpoint.hub as hub
parse = hub.parse_header
hub.parse_header = lambda data, path, size: (parse(data, path, size)[0], "xxh3:of another header")
{HASTY}"""
    done = run_python(code, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    refused(done, 1, "model-0000", "another header")
    assert not (tmp_path / "out" / "READY").exists()


def test_a_redirect_loop_is_left(hub: Hub, pull: Run) -> None:
    hub.faults = [Fault("loop", f"/resolve/{hub.repos[NAME].commit}/config.json")]
    refused(pull(), 1, "redirects in a circle")


@pytest.mark.parametrize("path", ["/api/", "/resolve/", "/stored/"])
def test_a_server_that_sends_nothing_is_given_up(
    hub: Hub, pull: Run, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    hub.faults = [Fault("silence", path)]
    refused(pull(), 1, "silent for 1 s")


@pytest.mark.parametrize("to_the_end", [True, False])
def test_a_server_that_only_trickles_is_given_up(
    hub: Hub, expected: Path, pull: Run, tmp_path: Path, to_the_end: bool
) -> None:
    hub.faults = [Fault("trickle", "/stored/", to_the_end=to_the_end)]
    code = f"import msconv.checkpoint.transfer as transfer\ntransfer.PACE_S = 0.3\n{HASTY}"
    done = run_python(code, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    refused(done, 1, "silent")
    goes_on(hub, pull, tmp_path / "out", expected)


def test_a_server_that_is_not_there(hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{s.getsockname()[1]}")
    refused(pull(), 1, "cannot be reached", "Connection refused", "HF_ENDPOINT")


def test_a_page_of_something_else_is_no_hub(hub: Hub, pull: Run) -> None:
    hub.faults = [Fault("status", "/api/", status=200)]
    refused(pull(), 1, "does not answer as a hub does")


def test_offline_with_nothing_in_the_cache(hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(pull(), 1, "HF_HUB_OFFLINE", NAME)
    assert not hub.requests


def test_offline_with_half_in_the_cache(
    hub: Hub, pull: Run, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull(NAME, "--dry-run").code == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(pull(), 1, "HF_HUB_OFFLINE", "model-00001-of-00008.safetensors")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    goes_on(hub, pull, tmp_path / "out", expected)


def test_a_repository_of_pickles_is_refused(hub: Hub, pull: Run, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shutil.copy(shards / "config.json", tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("some/bin", tmp_path / "bin")
    refused(pull("some/bin"), 1, "no *.safetensors", ".bin", "safetensors")
    assert not hub.served["pytorch_model.bin"]


def test_a_repository_that_is_no_model(hub: Hub, pull: Run, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.md").write_text("nothing")
    hub.add("some/none", tmp_path / "none")
    refused(pull("some/none"), 1, "config.json")


def test_no_space_in_the_cache_is_said_before_anything_comes(hub: Hub, tmp_path: Path) -> None:
    code = f"""
import shutil
usage = shutil.disk_usage
shutil.disk_usage = lambda p: usage(p)._replace(free=1 << 20) if "home" in str(p) else usage(p)
{HASTY}"""
    done = run_python(code, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    refused(done, 5, "not enough disk", "HF_HOME")
    assert sum(hub.served[p.name] for p in hub.repos[NAME].directory.glob("model-*")) <= 8 * (64 << 10)


def test_a_disk_that_fills_up_meanwhile_keeps_what_came(
    hub: Hub, pull: Run, expected: Path, tmp_path: Path
) -> None:
    code = f"""
import errno, os
from msconv.checkpoint.transfer import os as used
room, write = [12 << 20], os.write
def limited(fd, data):
    if os.readlink(f"/proc/self/fd/{{fd}}").endswith(".incomplete"):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.{errno.errorcode[errno.ENOSPC]}, os.strerror(errno.ENOSPC))
    return write(fd, data)
used.write = limited
{HASTY}"""
    done = run_python(code, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    refused(done, 5, "not enough disk", "HF_HOME")
    goes_on(hub, pull, tmp_path / "out", expected)


def test_what_a_disk_may_have_lost_of_a_download_is_not_taken_up(
    hub: Hub, pull: Run, expected: Path, tmp_path: Path
) -> None:
    """A sync fails once, and the next one would succeed without the bytes that were lost."""
    code = f"""
import errno, os
sync, failed = os.fdatasync, []
def fails_once(fd):
    if not failed and os.readlink(f"/proc/self/fd/{{fd}}").endswith(".incomplete"):
        failed.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    sync(fd)
os.fdatasync = fails_once
{HASTY}"""
    done = run_python(code, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    refused(done, 5, "Input/output error", "HF_HOME")
    assert [p.stat().st_size for p in (tmp_path / "home").rglob("*.incomplete")] == [0]
    goes_on(hub, pull, tmp_path / "out", expected)


def test_a_cache_that_cannot_be_written(
    hub: Hub, pull: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "home"))
    refused(pull(), 5, "cannot be written", "HF_HOME")


def test_errors_are_one_object_for_programs(hub: Hub, pull: Run) -> None:
    hub.faults = [Fault("status", "/api/", status=403)]
    error = pull(NAME, "--json").json["error"]
    assert error["code"] == "hub"
    assert "HTTP 403" in error["message"]


def test_a_string_that_can_be_no_repository_is_a_directory_that_is_missing(hub: Hub, pull: Run) -> None:
    for model in ("./Qwen/Qwen3-8B", "/Qwen/Qwen3-8B", "a/b/c", "Qwen/Qwen3-8B@", "Qwen/Qwen3 8B"):
        refused(pull(model), 2, "no such directory")
    assert not hub.requests


def test_a_name_that_no_hub_allows(hub: Hub, pull: Run) -> None:
    refused(pull("Qwen/.."), 2, "no name of a model")
    assert not hub.requests


# ModelScope: its client is not installed here; a module of its name records what it is asked for


@pytest.fixture
def modelscope(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that pretends to be the client; the file it returns gets a line for each call."""
    calls = tmp_path / "calls"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "modelscope.py").write_text(f"""
import shutil
from pathlib import Path
def snapshot_download(model_id, revision=None, allow_patterns=None):
    with open({str(calls)!r}, "a") as f:
        print(model_id, revision, *allow_patterns, file=f)
    if "broken" in model_id:
        raise ValueError("the request failed with code 404")
    target = Path({str(tmp_path / "snapshot")!r})
    target.mkdir(exist_ok=True)
    for name in allow_patterns:
        for path in Path({str(shards)!r}).glob(name):
            shutil.copy(path, target)
    return str(target)
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return calls


def test_modelscope_is_asked_for_needed_files_only(
    hub: Hub, modelscope: Path, pull: Run, shards: Path, expected: Path, tmp_path: Path
) -> None:
    done = pull(f"{NAME}@v1.0", "--source", "modelscope")
    assert done.code == 0, done.stderr
    assert same(tmp_path / "out", expected)
    first, second = modelscope.read_text().splitlines()
    assert first.startswith(f"{NAME} v1.0 config.json")
    assert second.split()[2:] == sorted(p.name for p in shards.glob("model-*"))
    assert not hub.requests


def test_modelscope_is_asked_for_no_weights_by_plan(hub: Hub, modelscope: Path, pull: Run) -> None:
    done = run_msconv("plan", "--model", NAME, "--tp", 4, "--source", "modelscope", "--json")
    assert done.code == 0, done.stderr
    assert "model-0000" not in modelscope.read_text()


def test_what_modelscopes_client_says_is_passed_on(hub: Hub, modelscope: Path, pull: Run) -> None:
    refused(pull("some/broken", "--source", "modelscope"), 1, "ModelScope", "code 404")


def test_without_modelscopes_client_it_is_said_how_to_install_it(hub: Hub, pull: Run) -> None:
    refused(pull(NAME, "--source", "modelscope"), 4, 'pip install "msconv[modelscope]"')


def test_deleting_what_modelscopes_client_owns_is_refused(hub: Hub, modelscope: Path, pull: Run) -> None:
    refused(pull(NAME, "--source", "modelscope", "--delete-source-as-you-go"), 2, "is a directory")

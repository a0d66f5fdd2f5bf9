"""Artifacts pushed to a hub and pulled from it: the same bytes, resumed, never half of one taken for a whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from msconv.share.card import MARK, card
from msconv_runtime.artifact import FORMAT, Graph, Verified, read_manifest
from tests.cli.interface import fields
from tests.cli.test_interface import frozen_fields
from tests.commands import Result, run_msconv, run_python
from tests.hub.conftest import HASTY
from tests.hub.server import Fault, Hub, sha256
from tests.hub.test_failures import refused
from tests.synthetic import digests
from tests.warm import run_warm

pytestmark = pytest.mark.slow

NAME = "me/Qwen3-8B-tp4"
Run = Callable[..., Result]


@pytest.fixture
def share(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that takes uploads from who has the token, by Git LFS; commands run in a directory of the test."""
    hub.home = tmp_path / "repositories"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.fixture
def own(expected: Path, tmp_path: Path) -> Path:
    """An artifact of 25 MB in 4 files that the test may change."""
    return Path(shutil.copytree(expected, tmp_path / "own"))


def done(result: Result) -> Result:
    assert result.code == 0, result.stderr
    return result


def push(artifact: Path, *options: object) -> Result:
    return run_msconv("push", artifact, "--to", NAME, *options)


def weights(artifact: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in (artifact / "weights").iterdir() if p.suffix == ".safetensors"}


# `msconv` as it is, but with a commit for each file of weights
MANY_COMMITS = """
import msconv.share.push as push
push.FILES_A_COMMIT = 1
from msconv.cli import main
main()
"""


def interrupted(moment: Callable[[], bool], number: int, *args: object) -> int:
    """`msconv ARGS` in a process of its own, ended by a signal once `moment` has come.  Its exit code."""
    command = [sys.executable, "-c", MANY_COMMITS, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not moment() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(60)


# There and back


def test_what_is_pushed_and_pulled_has_the_same_bytes(share: Hub, own: Path, tmp_path: Path) -> None:
    pushed = done(push(own, "--json", "--check")).json
    assert fields(pushed) == frozen_fields()["msconv push"]
    sizes = weights(own)
    assert pushed["repository"] == NAME
    assert pushed["bytes_uploaded"] >= sum(sizes.values())
    assert pushed["commit"] == share.repos[NAME].commit
    pulled = done(run_msconv("pull", NAME, "--json")).json
    assert fields(pulled) == frozen_fields()["msconv pull"]
    out = Path("artifacts/Qwen3-8B-tp4")
    assert pulled["artifact"] == str(out)
    assert pulled["commit"] == pushed["commit"]
    assert pulled["bytes_read"] >= sum(sizes.values())
    assert digests(out) == digests(own)
    assert done(run_msconv("inspect", out, "--check", "--json")).json["check"]["ok"]
    assert (out / "report.html").is_file()
    assert not any(".msconv" in name for name in share.repos[NAME].files())


def test_graphs_come_along(share: Hub, compiled: Path, tmp_path: Path) -> None:
    done(push(compiled))
    done(run_msconv("pull", NAME, "--output", tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(compiled)
    assert any(name.endswith(".mindir") for name in digests(tmp_path / "out"))


def test_again_nothing_moves(share: Hub, own: Path) -> None:
    first = done(push(own, "--json")).json
    again = done(push(own, "--json")).json
    assert (again["bytes_uploaded"], again["commit"], again["files"]) == (0, first["commit"], first["files"])
    assert done(run_msconv("pull", NAME, "--json")).json["bytes_read"]
    assert done(run_msconv("pull", NAME, "--json")).json["bytes_read"] == 0


def test_only_what_changed_is_moved_and_what_is_gone_is_deleted(share: Hub, own: Path, compiled: Path) -> None:
    done(push(compiled))
    done(run_msconv("pull", NAME))
    done(push(own))
    names = share.repos[NAME].files()
    assert {n for n in names if n.startswith("weights/")} == {f"weights/{n}" for n in weights(own)}
    assert not any(n.startswith("graphs/") for n in names)
    done(run_msconv("pull", NAME))
    assert read_manifest("artifacts/Qwen3-8B-tp4") == read_manifest(own)


def test_a_branch_is_made_and_pulled_by_its_name(share: Hub, own: Path, tmp_path: Path) -> None:
    said = done(push(own, "--revision", "v2", "--private")).stderr
    assert f"Next: msconv pull {NAME}@v2" in said
    assert share.repos[NAME].private
    done(run_msconv("pull", f"{NAME}@v2", "--output", tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(own)


def test_only_files_that_the_manifest_names_are_pulled(share: Hub, own: Path, tmp_path: Path) -> None:
    done(push(own))
    directory = share.repos[NAME].directory
    for name in ("modeling.py", "pytorch_model.bin", "weights/other.safetensors", "weights/x.py"):
        (directory / name).write_text("not wanted")
    done(run_msconv("pull", NAME, "--output", tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(own)
    asked = {r.path for r in share.requests}
    assert not any(name in path for path in asked for name in ("modeling", ".bin", "other", "x.py"))


# Interrupted


def test_ready_comes_with_the_last_commit_only(share: Hub, own: Path) -> None:
    done(run_python(MANY_COMMITS, "push", own, "--to", NAME))
    *earlier, last = share.commits
    assert {"READY", "msconv.json", "README.md"} <= set(last)
    assert sorted(names for names in earlier) == [[f"weights/{name}"] for name in sorted(weights(own))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_push_that_was_interrupted_goes_on(share: Hub, own: Path, tmp_path: Path, number: int) -> None:
    sizes = weights(own)
    share.bytes_per_second = 10e6
    code = interrupted(lambda: len(share.objects) >= 2, number, "push", own, "--to", NAME)
    assert code == (130 if number == signal.SIGINT else -number)
    assert "READY" not in share.repos[NAME].files()
    refused(run_msconv("pull", NAME), 1, "msconv convert --model")
    share.bytes_per_second = 0
    before = set(share.objects)
    already = {oid: share.uploaded[oid] for oid in before}
    done(push(own))
    assert {oid: share.uploaded[oid] for oid in before} == already  # what was there did not come again
    assert sum(share.uploaded.values()) < 2 * sum(sizes.values())
    done(run_msconv("pull", NAME, "--output", tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(own)


def test_a_push_of_other_weights_takes_ready_away_first(share: Hub, own: Path, compiled: Path) -> None:
    done(push(compiled))
    share.faults = [Fault("status", "/commit/", status=403, method="POST")]
    refused(push(own), 1, "HTTP 403", "write to")
    assert read_manifest(share.repos[NAME].directory) == read_manifest(compiled)  # no commit: nothing changed
    share.faults = []
    pushed = len(share.commits)
    share.bytes_per_second = 10e6
    interrupted(lambda: len(share.commits) > pushed, signal.SIGKILL, "push", own, "--to", NAME)
    share.bytes_per_second = 0
    assert "READY" not in share.repos[NAME].files()
    refused(run_msconv("pull", NAME), 1, "not pushed to the end")
    done(push(own))
    assert "READY" in share.commits[-1]
    assert read_manifest(share.repos[NAME].directory) == read_manifest(own)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_was_interrupted_goes_on(share: Hub, own: Path, tmp_path: Path, number: int) -> None:
    done(push(own))
    share.reset()
    sizes, out = weights(own), tmp_path / "out"
    share.bytes_per_second = 10e6
    total = sum(sizes.values())
    code = interrupted(lambda: share.served.total() > total // 2, number, "pull", NAME, "--output", out)
    assert code == (130 if number == signal.SIGINT else -number)
    assert not (out / "READY").exists()
    refused(run_msconv("inspect", out), 1)
    share.bytes_per_second = 0
    done(run_msconv("pull", NAME, "--output", out))
    assert digests(out) == digests(own)
    for name, size in sizes.items():
        assert share.served[name] < 1.5 * size, name
    assert not list(out.rglob("*.incomplete"))


def test_a_cut_connection_is_taken_up(share: Hub, own: Path, hasty: Run, tmp_path: Path) -> None:
    share.faults = [Fault("cut", "/upload/", times=1, after=1 << 20)]
    done(push(own))
    share.faults = [Fault("cut", "/stored/", times=3, after=1 << 20)]
    done(hasty("pull", NAME, "--output", tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(own)
    assert share.served.total() < 1.5 * sum(weights(own).values())


# Damage


def test_a_byte_that_flips_on_the_way_is_noticed(share: Hub, own: Path, tmp_path: Path) -> None:
    done(push(own))
    name = sorted(weights(own))[1]
    share.faults = [Fault("damage", f"/weights/{name}", after=1 << 20)]
    refused(run_msconv("pull", NAME, "--output", tmp_path / "out"), 1, name, "digest")
    assert not (tmp_path / "out" / "READY").exists()
    share.faults = []
    done(run_msconv("pull", NAME, "--output", tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(own)


def test_a_byte_that_flipped_on_the_hub_is_noticed(share: Hub, own: Path, tmp_path: Path) -> None:
    done(push(own))
    path = share.repos[NAME].directory / "weights" / sorted(weights(own))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert sha256(path)  # the hub vouches for what it has
    refused(run_msconv("pull", NAME, "--output", tmp_path / "out"), 1, path.name, "digest differs")
    assert not (tmp_path / "out" / "READY").exists()
    done(push(own))
    done(run_msconv("pull", NAME, "--output", tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(own)


def test_a_damaged_artifact_is_not_pushed(share: Hub, own: Path, own_artifact: Path) -> None:
    graph = next(own_artifact.rglob("*.mindir"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    refused(push(own_artifact), 1, graph.name, "digest differs")
    path = next((own / "weights").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(push(own, "--check"), 1, path.name, "digest differs")
    path.write_bytes(data[:-1])
    refused(push(own), 1, path.name)
    assert not share.commits


def test_what_is_not_ready_is_not_pushed(share: Hub, own: Path) -> None:
    (own / "READY").unlink()
    refused(push(own), 1, "READY is missing")
    assert not share.requests


# What is there already


def test_a_card_of_somebody_else_is_kept(share: Hub, own: Path) -> None:
    done(push(own))
    readme = share.repos[NAME].directory / "README.md"
    assert MARK in readme.read_text()
    readme.write_text("# Mine\n")
    assert "not written by msconv" in done(push(own)).stderr
    assert readme.read_text() == "# Mine\n"
    readme.write_text(f"{MARK}\nold\n")
    assert "not written by msconv" not in done(push(own)).stderr
    assert readme.read_text().startswith("---")


def test_a_repository_of_something_else_is_not_pushed_into(share: Hub, own: Path, tmp_path: Path) -> None:
    other = share.home / NAME if share.home else tmp_path
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"a model")
    share.add(NAME, other)
    refused(push(own), 2, "holds something else", "model.safetensors")
    assert [p.name for p in other.iterdir()] == ["model.safetensors"]


def test_a_repository_that_is_no_artifact_is_not_pulled(share: Hub, tmp_path: Path) -> None:
    refused(run_msconv("pull", "Qwen/Qwen3-8B"), 1, "no artifact", "msconv convert --model Qwen/Qwen3-8B --tp N")
    assert not (tmp_path / "artifacts").exists()


def test_a_newer_format_is_not_pulled(share: Hub, own: Path, tmp_path: Path) -> None:
    done(push(own))
    manifest = share.repos[NAME].directory / "msconv.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": FORMAT + 1}))
    share.reset()
    refused(run_msconv("pull", NAME), 1, f"format {FORMAT + 1}", "Upgrade msconv")
    assert not any(n.endswith(".safetensors") for n in share.served)
    assert not (tmp_path / "artifacts").exists()


def test_a_file_outside_the_artifact_is_not_pulled(share: Hub, own: Path, tmp_path: Path) -> None:
    import xxhash

    done(push(own))
    directory = share.repos[NAME].directory
    for path in ("weights/evil.py", ".msconv/lock", "config.json"):
        data = json.loads((own / "msconv.json").read_text())
        data["weights"]["files"][0]["path"] = path
        (directory / "msconv.json").write_text(json.dumps(data))
        digest = xxhash.xxh3_128_hexdigest((directory / "msconv.json").read_bytes())
        (directory / "READY").write_text(f"xxh3:{digest}\n")
        refused(run_msconv("pull", NAME), 1, path)
    assert not (tmp_path / "artifacts").exists()


def test_what_lies_in_the_output_is_not_overwritten(share: Hub, own: Path, expected: Path, tmp_path: Path) -> None:
    done(push(own))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    refused(run_msconv("pull", NAME, "--output", tmp_path / "full"), 2, "something else")
    refused(run_msconv("pull", NAME, "--output", own), 2, "was not pulled")
    assert digests(own) == digests(expected)
    done(run_msconv("pull", NAME))
    out = tmp_path / "artifacts" / "Qwen3-8B-tp4"
    done(run_warm("compile", out, "--target", "cpu"))
    refused(run_msconv("pull", NAME, "--output", out), 2, "changed since it was pulled")
    assert read_manifest(out).graphs


# The hub's and the disk's refusals


def test_a_push_without_a_right_to_it_says_so(
    share: Hub, own: Path, hasty: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.home = None
    refused(push(own), 1, "HTTP 403", "write to")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    wrong = push(own)
    refused(wrong, 1, "HTTP 401", "refused the token")
    assert "hf_wrong" not in wrong.stderr
    monkeypatch.delenv("HF_TOKEN")
    refused(push(own), 1, "HTTP 401", "wants a token", "HF_TOKEN")


@pytest.mark.parametrize(("path", "status"), [("/upload/", 403), ("/batch", 403), ("/commit/", 400)])
def test_a_refusal_in_the_middle_of_a_push_names_its_status(share: Hub, own: Path, path: str, status: int) -> None:
    share.faults = [Fault("status", path, status=status)]
    refused(push(own), 1, f"HTTP {status}", NAME)
    share.faults = []
    done(push(own))


def test_a_commit_that_fails_for_a_while_is_tried_again(share: Hub, own: Path, hasty: Run) -> None:
    share.faults = [Fault("status", "/commit/", status=503, times=2), Fault("status", "/create", times=1)]
    done(hasty("push", own, "--to", NAME))
    assert "READY" in share.repos[NAME].files()


def test_a_pull_that_is_refused_says_why(share: Hub, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(push(own, "--private"))
    missing = run_msconv("pull", "me/nothing")
    refused(missing, 2, "me/nothing", "no such model")
    assert "directory" not in missing.stderr
    refused(run_msconv("pull", f"{NAME}@v9"), 2, "no such revision")
    share.faults = [Fault("status", "/weights/", status=403)]
    refused(run_msconv("pull", NAME), 1, "HTTP 403")
    monkeypatch.delenv("HF_TOKEN")
    refused(run_msconv("pull", NAME), 2, "private", "HF_TOKEN")


def test_names_that_no_repository_has(share: Hub, own: Path) -> None:
    for name in ("nothing", "a/b/c", "./x/y"):
        refused(run_msconv("pull", name), 2, "owner/name")
        refused(run_msconv("push", own, "--to", name), 2, "owner/name")
    refused(run_msconv("push", own, "--to", f"{NAME}@v2"), 2, "--revision v2")
    assert not share.requests


def test_offline_is_said(share: Hub, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(push(own), 1, "HF_HUB_OFFLINE")
    refused(run_msconv("pull", NAME), 1, "HF_HUB_OFFLINE")
    assert not share.requests


def test_no_space_is_said_before_anything_comes(share: Hub, own: Path, tmp_path: Path) -> None:
    done(push(own))
    share.reset()
    code = f"""
import shutil
usage = shutil.disk_usage
shutil.disk_usage = lambda p: usage(p)._replace(free=1 << 20)
{HASTY}"""
    refused(run_python(code, "pull", NAME, "--output", tmp_path / "out"), 5, "not enough disk", "--output")
    assert not any(n.endswith(".safetensors") for n in share.served)
    done(run_msconv("pull", NAME, "--output", tmp_path / "out"))


# The card


def test_the_card_says_what_the_artifact_is(expected: Path, compiled: Path) -> None:
    import msgspec

    manifest = read_manifest(compiled)
    digest = [g.digest for g in manifest.graphs]
    assert manifest.weights
    proof = Verified("cpu", manifest.weights.digest, digest, "transformers 5", "float32", 1e-4, 3.5e-6, 1.0, 1, 64)
    model = msgspec.structs.replace(manifest.model, source="Qwen/Qwen3-8B", commit="0" * 40)
    ascend: list[Graph] = [msgspec.structs.replace(g, target="ascend910b") for g in manifest.graphs]
    graphs = [*manifest.graphs, *ascend]
    text = card(NAME, "v2", msgspec.structs.replace(manifest, model=model, graphs=graphs, verified=[proof]))
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "Qwen/Qwen3-8B",
        "library_name": "msconv",
        "tags": ["mindspore", "ascend", "sglang"],
    }
    for words in (
        MARK,
        "tp 1, ep 1",
        f"| weights | {manifest.weights.dtype}",
        "msconv pull me/Qwen3-8B-tp4@v2",
        "msconv serve artifacts/Qwen3-8B-tp4 --device npu",
        "largest logit error 3.50e-06 (bound 1e-04)",
        "none: unproven",
        "- ascend910b: not interpreted - not rehearsed - run on a device: never",
        "the graphs were compiled without an NPU",
    ):
        assert words in body
    plain = card(NAME, "", read_manifest(expected))
    assert "base_model" not in plain
    assert "There are none: `msconv compile" in plain


def test_a_card_is_not_written_by_whoever_named_the_model(expected: Path) -> None:
    import msgspec

    manifest = read_manifest(expected)
    evil = msgspec.structs.replace(manifest.model, source="x\n---\n# <script>[a](b)", family="`|")
    text = card(NAME, "", msgspec.structs.replace(manifest, model=evil))
    assert "<script>" not in text
    assert "\n# <" not in text.replace("\\", "")
    assert "\\`\\|" in text

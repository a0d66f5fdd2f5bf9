"""Checkpoints pulled from a hub: the same artifact as from a directory, nothing asked for that is not needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from msconv_runtime.artifact import read_manifest
from tests.checkpoints import Stored, read_safetensors, write_safetensors
from tests.commands import run_msconv, run_python
from tests.hub.conftest import NAME
from tests.hub.server import Hub
from tests.moe_checkpoints import add_mtp, make_deepseek_v3, quantise_fp8
from tests.synthetic import digests, qwen3_config, write_synthetic

pytestmark = pytest.mark.slow

WEIGHTS = "model-0000"
NODES = """
import sys
from pathlib import Path
from msconv.location import open_reference
from msconv.steps.conversion import run
from msconv.steps.convert import prepare
from tests.stream.clusters import Threads, nodes_of
cluster = Threads(["a", "b"])
run(prepare(open_reference(sys.argv[1]), 4, output=Path(sys.argv[2])), mover=nodes_of(cluster))
print(*sorted(set(cluster.moved)))
"""


def convert(out: Path, *options: object, model: str = NAME, code: int = 0) -> dict[str, Any]:
    done = run_msconv("convert", "--model", model, "--tp", 4, "--output", out, "--json", *options)
    assert done.code == code, done.stderr
    return done.json


def same(out: Path, expected: Path) -> bool:
    """All that the artifacts promise is equal but for where the model came from."""
    ours, theirs = digests(out), digests(expected)
    for found in (ours, theirs):
        for name in ("msconv.json", "READY", "report.html"):  # these name the source
            found.pop(name, None)
    first, second = read_manifest(out), read_manifest(expected)
    return ours == theirs and first.weights == second.weights and first.model.files == second.model.files


def test_a_model_of_a_hub_becomes_the_same_artifact_as_its_directory(
    hub: Hub, expected: Path, tmp_path: Path
) -> None:
    convert(tmp_path / "out")
    assert same(tmp_path / "out", expected)
    model = read_manifest(tmp_path / "out").model
    assert (model.source, model.commit) == (NAME, hub.repos[NAME].commit)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_nodes_of_a_cluster_read_what_their_driver_has_downloaded(
    hub: Hub, expected: Path, tmp_path: Path
) -> None:
    done = run_python(NODES, NAME, tmp_path / "out")
    assert done.code == 0, done.stderr
    assert done.stdout == "a b\n"
    assert same(tmp_path / "out", expected)
    assert read_manifest(tmp_path / "out").model.commit == hub.repos[NAME].commit


def test_a_recipes_name_is_enough(
    hub: Hub, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(tmp_path / "out", model=NAME.rpartition("/")[2])
    assert same(tmp_path / "out", expected)
    assert read_manifest(tmp_path / "out").model.source == NAME


def test_only_files_that_are_needed_are_asked_for(hub: Hub, shards: Path, tmp_path: Path) -> None:
    convert(tmp_path / "out")
    asked = {Path(r.path).name for r in hub.requests if "/api/" not in r.path}
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    aux = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert asked == {*index.values(), *aux}
    for name in index.values():
        size = (shards / name).stat().st_size
        assert hub.served[name] <= size + (64 << 10)  # itself and its header


def test_a_second_conversion_downloads_nothing(hub: Hub, expected: Path, tmp_path: Path) -> None:
    convert(tmp_path / "first")
    hub.reset()
    convert(tmp_path / "second")
    assert not hub.served
    assert same(tmp_path / "second", expected)


def test_the_cache_is_one_that_the_hubs_own_client_uses(hub: Hub, shards: Path, tmp_path: Path) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    convert(tmp_path / "out")
    cache = tmp_path / "home" / "hub"
    commit = hub.repos[NAME].commit
    for name in ("config.json", "model-00003-of-00008.safetensors"):
        for revision in ("main", commit):
            found = try_to_load_from_cache(NAME, name, cache_dir=cache, revision=revision)
            assert isinstance(found, str)
            assert Path(found).read_bytes() == (shards / name).read_bytes()
    report = scan_cache_dir(cache)
    assert not report.warnings
    assert [r.repo_id for r in report.repos] == [NAME]
    assert not list(cache.rglob("*.incomplete"))


def test_what_the_hubs_own_client_downloaded_is_not_downloaded_again(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    name = "model-00002-of-00008.safetensors"
    convert(tmp_path / "out", "--dry-run")
    snapshot = next((tmp_path / "home" / "hub").rglob("snapshots/*"))
    shutil.copyfile(shards / name, snapshot / name)
    hub.reset()
    convert(tmp_path / "out")
    assert name not in hub.served
    assert hub.served["model-00003-of-00008.safetensors"]


def test_plan_reads_headers_only_and_says_what_is_missing(hub: Hub, shards: Path, tmp_path: Path) -> None:
    plan = run_msconv("plan", "--model", NAME, "--tp", 4, "--json")
    assert plan.code == 0, plan.stderr
    sizes = {p.name: p.stat().st_size for p in shards.glob("model-*.safetensors")}
    assert plan.json["download_bytes"] == sum(sizes.values())
    assert plan.json["output_bytes"] == convert(tmp_path / "out", "--dry-run")["output_bytes"]
    assert sum(hub.served[n] for n in sizes) <= 2 * len(sizes) * (64 << 10)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    convert(tmp_path / "out")
    assert run_msconv("plan", "--model", NAME, "--tp", 4, "--json").json["download_bytes"] == 0
    assert convert(tmp_path / "other", "--dry-run")["download_bytes"] == 0


def test_plan_of_a_repository_without_weights_takes_shapes_from_its_configuration(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "only").mkdir()
    shutil.copy(shards / "config.json", tmp_path / "only")
    hub.add("some/only", tmp_path / "only")
    plan = run_msconv("plan", "--model", "some/only", "--tp", 4)
    assert plan.code == 0, plan.stderr
    assert "no weights here yet" in plan.stdout


def test_a_long_header_is_read_by_a_second_range(hub: Hub, tmp_path: Path) -> None:
    model = write_synthetic(tmp_path / "deep", qwen3_config(num_hidden_layers=120))
    hub.add("some/deep", model)
    convert(tmp_path / "out", "--dry-run", model="some/deep")
    ranges = [r.range for r in hub.asked("/stored/")]
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=65536-")
    convert(tmp_path / "out", model="some/deep", code=0)


def test_a_revision_is_resolved_and_a_moved_branch_does_not_matter(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos[NAME]
    repo.branches = ("main", "v1.0")
    for i, revision in enumerate(("v1.0", repo.commit)):
        convert(tmp_path / str(i), model=f"{NAME}@{revision}")
        assert read_manifest(tmp_path / str(i)).model.commit == repo.commit
    assert not [r for r in hub.asked("/resolve/") if repo.commit not in r.path]


def test_a_full_cache_is_enough_without_a_network(
    hub: Hub, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tmp_path / "first")
    hub.reset()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    convert(tmp_path / "second")
    assert not hub.requests
    assert same(tmp_path / "second", expected)
    assert read_manifest(tmp_path / "second").model.commit == hub.repos[NAME].commit


def test_a_directory_of_this_name_comes_first(
    hub: Hub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards, tmp_path / NAME)
    convert(tmp_path / "out")
    assert not hub.requests


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME].gated = hub.repos[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    convert(tmp_path / "out")
    assert {r.token for r in hub.asked("/api/models/")} == {"hf_right"}
    assert {r.token for r in hub.asked("/resolve/")} == {"hf_right"}
    assert {r.token for r in hub.asked("/stored/")} == {""}


def test_shards_of_which_nothing_is_used_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    model = add_mtp(make_deepseek_v3(tmp_path / "mtp", shards=2))
    hub.add("some/mtp", model)
    convert(tmp_path / "out", "--no-drafts", model="some/mtp")
    convert(tmp_path / "whole", "--no-drafts", model=str(model))
    assert same(tmp_path / "out", tmp_path / "whole")
    downloaded = {Path(r.path).name for r in hub.asked("/stored/") if r.range == "bytes=0-"}
    assert downloaded < {p.name for p in model.glob("*.safetensors")}


def test_a_head_that_repeats_the_embedding_is_compared_with_it(hub: Hub, tmp_path: Path) -> None:
    model = write_synthetic(tmp_path / "tied", qwen3_config(tie_word_embeddings=True), shards=3)
    first = min(model.glob("*.safetensors"))
    embedding = read_safetensors(first)["model.embed_tokens.weight"]
    write_safetensors(model / "model-head.safetensors", {"lm_head.weight": embedding})
    index = model / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**names, "lm_head.weight": "model-head.safetensors"}}))
    hub.add("some/tied", model)
    convert(tmp_path / "out", "--delete-source-as-you-go", model="some/tied")
    convert(tmp_path / "whole", model=str(model))
    assert same(tmp_path / "out", tmp_path / "whole")
    other = Stored(embedding.code, embedding.bits ^ 1)
    write_safetensors(model / "model-head.safetensors", {"lm_head.weight": other})
    assert convert(tmp_path / "other", model="some/tied", code=1)["error"]["code"] == "checkpoint"


def test_shards_are_converted_while_others_still_come(hub: Hub, expected: Path, tmp_path: Path) -> None:
    hub.bytes_per_second = 12e6
    watched = """
import sys, time
import msconv.stream.hub_source as hub_source
read, first = hub_source.HubSource.read, []
def timed(self, info, begin, out):
    read(self, info, begin, out)
    if not first:
        first.append(time.monotonic())
        print(f"first read at {first[0]}", file=sys.stderr)
hub_source.HubSource.read = timed
from msconv.cli import main
main()
"""
    done = run_python(watched, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    first_read = float(done.stderr.split("first read at ")[1].split()[0])
    assert first_read < max(end for name, (_, end) in hub.spans.items() if name.startswith(WEIGHTS))
    assert same(tmp_path / "out", expected)


def test_several_shards_come_at_a_time_and_in_order(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 20e6
    convert(tmp_path / "out")
    bodies = [Path(r.path).name for r in hub.asked("/stored/") if r.range == "bytes=0-"]
    assert sorted(bodies[:4]) == [f"model-0000{i}-of-00008.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(bodies[4:]) == [f"model-0000{i}-of-00008.safetensors" for i in (5, 6, 7, 8)]


def test_compile_without_weights_takes_a_repository(hub: Hub, shards: Path, tmp_path: Path) -> None:
    from msconv.location import open_reference
    from msconv.steps.compile import begin_without_weights

    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from {open_reference.__module__} import open_reference
from {begin_without_weights.__module__} import begin_without_weights
begin_without_weights(open_reference("{NAME}", weights=False), 4, 1, Path("{out}"))
"""
    assert run_python(code).code == 0
    assert not hub.asked(WEIGHTS)
    convert(out)
    assert read_manifest(out).model.commit == hub.repos[NAME].commit


def test_verify_finds_what_an_artifact_was_pulled_from(hub: Hub, shards: Path, tmp_path: Path) -> None:
    convert(tmp_path / "out", "--delete-source-as-you-go")
    code = """
import sys
from pathlib import Path
from msconv.verify.reference import source_of
print(source_of(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
"""
    for given in ((), (NAME,)):
        done = run_python(code, tmp_path / "out", *given)
        assert done.code == 0, done.stderr
        found = Path(done.stdout.strip())
        for path in shards.glob("model-*"):
            assert (found / path.name).read_bytes() == path.read_bytes()


def test_scales_may_come_in_another_shard_than_their_weights(hub: Hub, tmp_path: Path) -> None:
    source = make_deepseek_v3(tmp_path / "source", hidden_size=256, moe_intermediate_size=256)
    model = quantise_fp8(source, tmp_path / "fp8", shards=5)
    hub.add("some/fp8", model)
    for options in ((), ("--delete-source-as-you-go",)):
        out = tmp_path / f"out{len(options)}"
        convert(out, *options, model="some/fp8")
        convert(tmp_path / "whole", model=str(model))
        assert same(out, tmp_path / "whole")
        shutil.rmtree(tmp_path / "home")


# Xet: its servers cannot be had here; what is shown is that the official client is asked, and only then

XET = """
import sys
import msconv.checkpoint.hub as hub
from pathlib import Path
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
class Report:
    def __init__(self, n):
        self.total_bytes_completed = self.total_transfer_bytes_completed = self.total_bytes = n
        self.total_bytes_completion_rate = self.total_transfer_bytes_completion_rate = 1.0
came = []
def download(name, file, revision, local_dir, tqdm_class):
    sys.stderr.write(f"xet {file} ")
    source = Path(SHARDS, file)
    size = source.stat().st_size
    with XetDownloadProgressReporter(
        reconstruction_desc="", total=size, log_level=30, tqdm_class=tqdm_class
    ) as bar:
        for n in (0, size // 2, size):
            bar.update_progress(Report(n))
    target = Path(local_dir, file) if local_dir else hub.Path(hub.constants.HF_HUB_CACHE, SNAPSHOT, file)
    target.write_bytes(source.read_bytes())
    return str(target)
hub.hf_hub_download = download
import msconv.steps.conversion as steps
run = steps.run
def counted(conversion, force, advance, downloading, *rest):
    done = run(conversion, force, advance, came.append, *rest)
    print("came", sum(came), "of", conversion.download_bytes, file=sys.stderr)
    return done
steps.run = counted
from msconv.cli import main
main()
"""


@pytest.mark.parametrize("options", [(), ("--delete-source-as-you-go",)])
def test_what_a_hub_offers_by_xet_its_own_client_downloads(
    hub: Hub, shards: Path, expected: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    hub.xet = True
    snapshot = f"models--Qwen--Qwen3-8B/snapshots/{hub.repos[NAME].commit}"
    code = XET.replace("SHARDS", repr(str(shards))).replace("SNAPSHOT", repr(snapshot))
    done = run_python(code, "convert", "--model", NAME, "--tp", 4, "--output", tmp_path / "out", *options)
    assert done.code == 0, done.stderr
    assert same(tmp_path / "out", expected)
    assert done.stderr.count("xet model-") == 8
    size = sum(p.stat().st_size for p in shards.glob("model-*"))
    assert f"came {size} of {size}" in done.stderr
    assert not [r for r in hub.asked("/stored/") if r.range == "bytes=0-"]


def test_without_xets_client_its_files_come_like_any_other(
    hub: Hub, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.xet = True
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    convert(tmp_path / "out")
    assert same(tmp_path / "out", expected)

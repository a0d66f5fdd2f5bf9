"""From any layout to any other: the files of a direct conversion, or an error that names what is damaged."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv.steps.conversion import Converted, run
from msconv.steps.reshard import prepare as prepare_reshard
from msconv_runtime.artifact import Graph, GraphInput, GraphOutput, TensorEntry, read_manifest, write_manifest
from msconv_runtime.errors import ArtifactError, MsconvError
from tests.checkpoints import make_qwen3
from tests.commands import run_command, run_msconv
from tests.conversions import prepare, with_buffers
from tests.stream.crashes import FAULTS, crash, faulty
from tests.stream.faults import Fault
from tests.stream.test_crash import FEWEST, MOST
from tests.synthetic import digests, qwen3_config, write_synthetic

pytestmark = pytest.mark.slow

LAYOUTS = (1, 2, 4, 8, 16)
MODEL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 1003,
    "attention_bias": True,
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<variant>-tp<N>`, all converted directly.  To be read, never changed."""
    root = tmp_path_factory.mktemp("artifacts")
    for variant, tied in (("tied", True), ("untied", False)):
        make_qwen3(root / variant, tie_word_embeddings=tied, dtype="bfloat16", shards=3, **MODEL)
        for tp in LAYOUTS:
            run(prepare(root / variant, tp, output=root / f"{variant}-tp{tp}"))
    for tp in (2, 8):
        run(prepare(root / "untied", tp, dtype="float32", output=root / f"cast-tp{tp}"))
    return root


@pytest.fixture
def own(artifacts: Path, tmp_path: Path) -> Any:
    """`own("tied-tp4")`: a copy that the test may change."""
    return lambda name: Path(shutil.copytree(artifacts / name, tmp_path / f"own-{name}"))


def reshard(artifact: Path, output: Path, tp: int, force: bool = False, **options: Any) -> Converted:
    return run(prepare_reshard(artifact, tp, output=output, **options), force)


@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize(("old", "new"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_any_layout_becomes_any_other_to_the_byte(
    artifacts: Path, tmp_path: Path, variant: str, old: int, new: int
) -> None:
    reshard(artifacts / f"{variant}-tp{old}", tmp_path / "out", new)
    assert digests(tmp_path / "out") == digests(artifacts / f"{variant}-tp{new}")


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_a_chain_of_layouts_loses_nothing(artifacts: Path, tmp_path: Path, variant: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chain = random.Random(seed).choices(LAYOUTS, k=8)
    here = artifacts / f"{variant}-tp1"
    for i, tp in enumerate(chain):
        reshard(here, tmp_path / str(i), tp)
        here = tmp_path / str(i)
        assert digests(here) == digests(artifacts / f"{variant}-tp{tp}"), chain[: i + 1]


def test_the_source_checkpoint_is_not_needed(own: Any, artifacts: Path, tmp_path: Path) -> None:
    artifact = own("untied-tp4")
    shutil.rmtree(artifact / ".msconv")
    reshard(artifact, tmp_path / "out", 8)
    assert digests(tmp_path / "out") == digests(artifacts / "untied-tp8")


def test_a_cast_is_made_once(artifacts: Path, tmp_path: Path) -> None:
    for old, new in ((2, 8), (8, 2)):
        reshard(artifacts / f"cast-tp{old}", tmp_path / str(new), new)
        assert digests(tmp_path / str(new)) == digests(artifacts / f"cast-tp{new}")


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_any_number_of_workers_writes_the_same_bytes(artifacts: Path, tmp_path: Path, jobs: int) -> None:
    reshard(artifacts / "untied-tp8", tmp_path / "out", 2, jobs=jobs)
    assert digests(tmp_path / "out") == digests(artifacts / "untied-tp2")


@pytest.mark.parametrize("tp", [2, 8])
def test_blocks_smaller_than_a_tensor_write_the_same_bytes(artifacts: Path, tmp_path: Path, tp: int) -> None:

    from msconv.stream.buffers import BufferSizes

    for old in (1, 16):
        conversion = prepare_reshard(artifacts / f"untied-tp{old}", tp, output=tmp_path / str(old), jobs=2)
        run(with_buffers(conversion, BufferSizes(1024, 1024)))
        assert digests(tmp_path / str(old)) == digests(artifacts / f"untied-tp{tp}")


def test_the_output_is_named_after_model_and_ranks(artifacts: Path, tmp_path: Path) -> None:
    done = run_msconv("reshard", artifacts / "tied-tp4", "--tp", 2, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.json["artifact"] == "artifacts/tied-tp2"
    assert digests(tmp_path / "artifacts" / "tied-tp2") == digests(artifacts / "tied-tp2")


# Damage


def flip(artifact: Path, rank: int, entry: TensorEntry, offset: int) -> None:
    """Turn over one bit of a rank's tensor, and let the file look as before."""
    weights = read_manifest(artifact).weights
    assert weights is not None
    path = artifact / [f.path for f in weights.files if f.rank == rank][entry.file]
    data = bytearray(path.read_bytes())
    data[entry.begin + offset] ^= 1 << (offset % 8)
    path.write_bytes(data)


def tensors(artifact: Path) -> list[TensorEntry]:
    weights = read_manifest(artifact).weights
    assert weights is not None
    return weights.tensors


def check_refused(artifact: Path, out: Path, tp: int, name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        reshard(artifact, out, tp)
    assert name in caught.value.message
    assert caught.value.hint
    assert not (out / "READY").exists()


def of_a_layer(entry: TensorEntry) -> bool:
    return ".layers.1." in entry.name


@pytest.mark.parametrize(("old", "new"), [(1, 2), (4, 1), (4, 16), (16, 4), (8, 8)])
def test_a_flipped_bit_in_a_part_of_any_tensor_is_refused_by_its_name(
    own: Any, tmp_path: Path, old: int, new: int
) -> None:
    """Every rank holds a part of these that no other has."""
    for entry in tensors(own(f"untied-tp{old}")):
        if of_a_layer(entry) or entry.name in ("vocab_start", "rank_onehot") or entry.name.endswith("norm.weight"):
            continue
        artifact, rank = tmp_path / f"own-untied-tp{old}", old - 1
        offset = 5 if rank == 0 else entry.parts[0] // 3  # of the embedding's last rank: before its padding
        flip(artifact, rank, entry, offset)
        unique = entry.name.endswith(("embed_tokens.weight", "lm_head.weight", "qkv_proj.weight", "qkv_proj.bias"))
        unique |= entry.name.endswith(("gate_up_proj.weight", "o_proj.weight", "down_proj.weight")) or rank == 0
        if unique:
            check_refused(artifact, tmp_path / "out", new, entry.name)
            shutil.rmtree(tmp_path / "out")
        flip(artifact, rank, entry, offset)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("old", [2, 8, 16])
def test_a_flipped_bit_in_each_part_of_a_joined_tensor_is_refused(
    own: Any, tmp_path: Path, old: int, part: int
) -> None:
    """Rank 0's queries, keys and values: nobody else's are read in their place."""
    artifact = own(f"untied-tp{old}")
    entry = next(t for t in tensors(artifact) if t.name.endswith("qkv_proj.weight"))
    flip(artifact, 0, entry, sum(entry.parts[:part]) + 3)
    check_refused(artifact, tmp_path / "out", 4, entry.name)


@pytest.mark.parametrize("rank", [1, 2, 7, 15])
@pytest.mark.parametrize("suffix", ["qkv_proj.weight", "qkv_proj.bias"])
def test_a_flipped_bit_beside_replicated_heads_is_refused(
    own: Any, tmp_path: Path, rank: int, suffix: str
) -> None:
    """16 ranks share 4 key and value heads: some ranks' keys and values are not read, but their queries are."""
    artifact = own("untied-tp16")
    entry = next(t for t in tensors(artifact) if t.name.endswith(suffix))
    flip(artifact, rank, entry, 2)
    check_refused(artifact, tmp_path / "out", 2, entry.name)


@pytest.mark.parametrize("old", [2, 4, 16])
def test_any_flipped_bit_is_refused_or_changes_nothing(
    own: Any, artifacts: Path, tmp_path: Path, old: int
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    artifact = own(f"tied-tp{old}")
    refused = 0
    for i in range(40):
        entry, rank = rng.choice(tensors(artifact)), rng.randrange(old)
        offset = rng.randrange(entry.nbytes)
        flip(artifact, rank, entry, offset)
        out = tmp_path / str(i)
        try:
            reshard(artifact, out, rng.choice(LAYOUTS))
        except ArtifactError as e:
            refused += 1
            assert entry.name in e.message
            assert not (out / "READY").exists()
        else:
            tp = read_manifest(out).parallel.tp
            assert digests(out) == digests(artifacts / f"tied-tp{tp}"), (
                f"{entry.name} of rank {rank}, byte {offset}"
            )
        flip(artifact, rank, entry, offset)
    assert refused


def test_damage_that_was_read_before_a_crash_is_refused_after_it(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, out = own("untied-tp4"), tmp_path / "out"
    entry = tensors(artifact)[0]
    flip(artifact, 0, entry, 7)
    half_done(artifact, out, 2)
    check_refused(artifact, out, 2, entry.name)


@pytest.mark.parametrize("done", [3, 4, 5])
def test_damage_in_one_part_is_refused_when_a_crash_parted_it_from_the_others(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Queries, keys and values of a tensor are moved one by one; a crash comes between."""
    artifact, out = own("untied-tp4"), tmp_path / "out"
    entry = next(t for t in tensors(artifact) if t.name.endswith("qkv_proj.weight"))
    flip(artifact, 1, entry, 7)
    half_done(artifact, out, 2, done)
    check_refused(artifact, out, 2, entry.name)


def test_damage_in_a_refused_run_is_refused_again(own: Any, tmp_path: Path) -> None:
    artifact, out = own("untied-tp4"), tmp_path / "out"
    entry = next(t for t in tensors(artifact) if t.name.endswith("down_proj.weight"))
    flip(artifact, 3, entry, 7)
    for _ in range(3):
        check_refused(artifact, out, 2, entry.name)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(own: Any, tmp_path: Path, change: int) -> None:
    artifact = own("untied-tp4")
    path = artifact / "weights/model-rank-2-part-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if change < 0 else path.read_bytes() + b"x")
    check_refused(artifact, tmp_path / "out", 2, "model-rank-2-part-0.safetensors")


def test_a_missing_file_is_refused(own: Any, tmp_path: Path) -> None:
    artifact = own("untied-tp4")
    (artifact / "weights/model-rank-3-part-0.safetensors").unlink()
    check_refused(artifact, tmp_path / "out", 2, "model-rank-3-part-0.safetensors")


def test_an_unfinished_artifact_is_refused(own: Any, tmp_path: Path) -> None:
    artifact = own("untied-tp4")
    (artifact / "READY").unlink()
    check_refused(artifact, tmp_path / "out", 2, "READY")


def test_another_config_than_the_artifacts_is_refused(own: Any, tmp_path: Path) -> None:
    artifact = own("untied-tp4")
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    check_refused(artifact, tmp_path / "out", 2, "config.json")


@pytest.mark.parametrize("how", ["truncate", "touch", "rewrite", "unlink"])
def test_an_artifact_that_changes_while_it_is_read_is_an_error(own: Any, tmp_path: Path, how: str) -> None:
    artifact, out = own("untied-tp4"), tmp_path / "out"
    path = artifact / "weights/model-rank-1-part-0.safetensors"
    fault = Fault(how, 20, ("preadv",), target=str(path))
    done = faulty(fault, "reshard", artifact, "--tp", 2, "--output", out, "--json")
    assert "Traceback" not in done.stderr
    assert done.code == 1, done.stderr
    assert done.json["error"]["code"] in ("artifact", "checkpoint")
    assert path.name in done.json["error"]["message"]
    assert not (out / "READY").exists()


# The directory it writes to


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("linked", [False, True])
def test_an_artifact_is_never_resharded_onto_itself(
    own: Any, tmp_path: Path, tp: int, force: bool, linked: bool
) -> None:
    artifact = own("untied-tp4")
    out = artifact
    if linked:
        out = tmp_path / "link"
        out.symlink_to(artifact)
    before = digests(artifact)
    with pytest.raises(MsconvError) as caught:
        reshard(artifact, out, tp, force=force)
    assert caught.value.hint
    assert digests(artifact) == before
    read_manifest(artifact)


def test_another_artifact_in_the_output_is_refused_and_replaced_on_demand(own: Any, artifacts: Path) -> None:
    out = own("tied-tp2")
    before = digests(out)
    with pytest.raises(ArtifactError) as caught:
        reshard(artifacts / "untied-tp4", out, 2)
    assert "--force" in caught.value.hint
    assert digests(out) == before
    reshard(artifacts / "untied-tp4", out, 2, force=True)
    assert digests(out) == digests(artifacts / "untied-tp2")


def test_running_again_on_a_finished_one_does_nothing(artifacts: Path, tmp_path: Path) -> None:
    reshard(artifacts / "untied-tp4", tmp_path / "out", 2)
    done = reshard(artifacts / "untied-tp4", tmp_path / "out", 2)
    assert (done.bytes_read, done.bytes_written) == (0, 0)
    assert digests(tmp_path / "out") == digests(artifacts / "untied-tp2")


def test_graphs_are_not_copied_and_the_message_says_how_to_compile_them(own: Any, tmp_path: Path) -> None:
    artifact = own("untied-tp4")
    plain = digests(artifact)
    (artifact / "graphs" / "cpu").mkdir(parents=True)
    (artifact / "graphs" / "cpu" / "decode.mindir").write_bytes(b"graph")
    caches = [GraphInput("k_cache.0", "float32", [None, 1, 2, 16], "cache")]
    logits = [GraphOutput("logits", "float32", [None, 1003])]
    graph = Graph("cpu", "decode", "graphs/cpu/decode.mindir", 5, "xxh3:0", "2.10.0", 1, caches, logits, [])
    write_manifest(artifact, msgspec.structs.replace(read_manifest(artifact), graphs=[graph]))
    done = run_msconv("reshard", artifact, "--tp", 8, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    assert done.json["bytes_read"] > 0
    assert "Graphs are made for one number of ranks and were not copied" in done.stderr
    assert f"msconv compile {tmp_path / 'out'}" in done.stderr
    assert not (tmp_path / "out" / "graphs").exists()
    assert read_manifest(tmp_path / "out").graphs == []
    reshard(tmp_path / "out", tmp_path / "back", 4)
    assert digests(tmp_path / "back") == plain


@pytest.mark.parametrize("tp", [3, 5, 32])
def test_ranks_that_do_not_divide_are_refused_with_those_that_do(artifacts: Path, tmp_path: Path, tp: int) -> None:
    done = run_msconv("reshard", artifacts / "tied-tp4", "--tp", tp, "--output", tmp_path / "out", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "plan"
    assert "Try --tp 1, 2, 4, 8 or 16" in done.json["error"]["hint"]
    assert not (tmp_path / "out").exists()


# Crashes


def half_done(artifact: Path, out: Path, tp: int, tensors: int = 10) -> None:
    """A reshard that died after some tensors."""
    crash(tensors, lambda: reshard(artifact, out, tp))


@pytest.mark.parametrize(("old", "new"), [(1, 4), (16, 2)])
@pytest.mark.parametrize("at", [2, 15, 29])
def test_a_killed_reshard_resumes_to_the_same_bytes(
    artifacts: Path, tmp_path: Path, old: int, new: int, at: int
) -> None:
    options = ("reshard", artifacts / f"untied-tp{old}", "--tp", new, "--output", tmp_path / "out", "--json")
    killed = faulty(Fault("kill", at, ("write",), "journal"), *options, "--jobs", 2)
    assert killed.code == -signal.SIGKILL
    assert not (tmp_path / "out" / "READY").exists()
    done = run_msconv(*options, "--jobs", 3)
    assert done.code == 0, done.stderr
    assert done.json["resumed"] is True
    assert digests(tmp_path / "out") == digests(artifacts / f"untied-tp{new}")


def test_a_kill_at_any_step_of_a_reshard_loses_nothing(tmp_path: Path) -> None:
    model = write_synthetic(tmp_path / "tiny", qwen3_config())
    run(prepare(model, 4, output=tmp_path / "tp4"))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    spec = {"do": "kill", "times": 1, "begin": "nothing", "durable_every": 2000, "seed": seed, "jobs": [1, 3]}
    spec |= {"root": str(tmp_path / "sweep"), "most": MOST}
    line = [sys.executable, str(FAULTS), "--sweep", json.dumps(spec), "reshard", str(tmp_path / "tp4")]
    done = run_command([*line, "--tp", "2"], None, 300)
    assert done.code == 0, done.stderr
    assert not done.json["problems"], "\n".join(done.json["problems"])
    assert done.json["ended"] >= FEWEST


def test_an_artifact_that_changed_since_the_crash_is_refused(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, out = own("untied-tp4"), tmp_path / "out"
    half_done(artifact, out, 2)
    (artifact / "weights/model-rank-0-part-0.safetensors").touch()
    with pytest.raises(MsconvError) as caught:
        reshard(artifact, out, 2)
    assert "source files" in caught.value.message
    assert "--force" in caught.value.hint


def test_a_ceiling_on_memory_is_kept(tmp_path: Path) -> None:
    """Blocks that are put together from many ranks count too."""
    config = qwen3_config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=2, num_attention_heads=16, head_dim=128
    )
    model = write_synthetic(tmp_path / "wide", config | {"num_key_value_heads": 8, "vocab_size": 4096})
    assert sum(p.stat().st_size for p in model.iterdir()) > 200_000_000
    options = ("--jobs", 2, "--max-memory", "112M", "--json")
    first = run_msconv("convert", "--model", model, "--tp", 8, "--output", tmp_path / "tp8", *options)
    assert first.code == 0, first.stderr
    assert first.json["peak_rss_bytes"] < 112 << 20
    done = run_msconv("reshard", tmp_path / "tp8", "--tp", 2, "--output", tmp_path / "tp2", *options)
    assert done.code == 0, done.stderr
    assert done.json["peak_rss_bytes"] < 112 << 20
    header = struct.unpack("<Q", (model / "model.safetensors").read_bytes()[:8])[0]
    assert done.json["bytes_read"] == (model / "model.safetensors").stat().st_size - 8 - header

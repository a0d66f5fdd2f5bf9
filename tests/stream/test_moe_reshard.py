"""Artifacts of models with experts from one layout to another, and work that was cut short."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from msconv.steps.conversion import run
from msconv.steps.reshard import prepare as prepare_reshard
from msconv.stream.buffers import buffer_sizes
from msconv_runtime.artifact import TensorEntry
from msconv_runtime.errors import ArtifactError
from tests.commands import run_msconv
from tests.conversions import convert, prepare, with_buffers
from tests.stream.crashes import crash, faulty
from tests.stream.faults import Fault
from tests.stream.moe_models import MESHES, RESHARDED, Artifacts, Models, assert_nothing, reshard, weights_of
from tests.synthetic import digests

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(MESHES, 2)))
@pytest.mark.parametrize("kind", RESHARDED)
def test_any_layout_becomes_any_other_to_the_byte(
    artifact: Artifacts, tmp_path: Path, kind: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    reshard(artifact(kind, *old), tmp_path / "out", *new)
    assert digests(tmp_path / "out") == digests(artifact(kind, *new))


@pytest.mark.parametrize("kind", ["qwen3_moe as float16", "deepseek FP8 as float32"])
def test_a_cast_is_made_once(artifact: Artifacts, tmp_path: Path, kind: str) -> None:
    for old, new in (((1, 1), (8, 4)), ((8, 4), (2, 1))):
        out = tmp_path / "{}-{}".format(*new)
        reshard(artifact(kind, *old), out, *new)
        assert digests(out) == digests(artifact(kind, *new))


@pytest.mark.parametrize("kind", RESHARDED)
def test_small_blocks_reshard_to_the_same_bytes(artifact: Artifacts, tmp_path: Path, kind: str) -> None:
    conversion = prepare_reshard(artifact(kind, 4, 4), 2, 1, tmp_path / "out", jobs=3)
    run(with_buffers(conversion, buffer_sizes(conversion.plan)))
    assert digests(tmp_path / "out") == digests(artifact(kind, 2, 1))


def flip(artifact: Path, rank: int, entry: TensorEntry, offset: int) -> None:
    """Turn over one bit of a rank's tensor, and let the file look as before."""
    path = artifact / [f.path for f in weights_of(artifact).files if f.rank == rank][entry.file]
    data = bytearray(path.read_bytes())
    data[entry.begin + offset] ^= 1 << (offset % 8)
    path.write_bytes(data)


@pytest.mark.parametrize(("old", "new"), [((8, 4), (2, 1)), ((4, 2), (4, 4)), ((1, 1), (4, 2))])
@pytest.mark.parametrize("kind", RESHARDED)
def test_a_flipped_bit_of_any_tensor_of_a_layer_is_refused_by_name(
    own_artifact: Artifacts, tmp_path: Path, kind: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    """In any rank's file, its copies and constants included."""
    damaged = own_artifact(kind, *old)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    entries = [t for t in weights_of(damaged).tensors if ".layers.0." not in t.name and "vocab" not in t.name]
    entries = [t for t in entries if t.name not in ("model.embed_tokens.weight", "lm_head.weight")]
    for entry in rng.sample(entries, 3):
        rank, offset = rng.randrange(old[0]), rng.randrange(entry.nbytes)
        flip(damaged, rank, entry, offset)
        with pytest.raises(ArtifactError) as caught:
            reshard(damaged, tmp_path / "out", *new)
        assert entry.name in caught.value.message
        assert f"model-rank-{rank}-" in caught.value.message
        assert caught.value.hint
        assert_nothing(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        flip(damaged, rank, entry, offset)


@pytest.mark.parametrize("part", ["first expert", "last expert", "gate", "up"])
def test_a_flipped_bit_in_any_expert_is_refused(own_artifact: Artifacts, tmp_path: Path, part: str) -> None:
    damaged = own_artifact("deepseek FP8", 4, 2)
    entry = next(t for t in weights_of(damaged).tensors if t.name.endswith("experts.gate_up_proj.weight"))
    row = 2 * entry.shape[2]
    offset = {"first expert": 0, "last expert": entry.nbytes - 1, "gate": row // 2 - 1, "up": row // 2}[part]
    flip(damaged, 3, entry, offset)
    with pytest.raises(ArtifactError, match=re.escape(entry.name)):
        reshard(damaged, tmp_path / "out", 8, 1)
    assert_nothing(tmp_path / "out")


# Crashes


@pytest.mark.parametrize("kind", RESHARDED)
@pytest.mark.parametrize("units", [1, 12, 30])
def test_a_crashed_conversion_resumes_to_the_same_bytes(
    artifact: Artifacts, model: Models, tmp_path: Path, kind: str, units: int
) -> None:
    whole = prepare(model(kind), 4, 2, output=tmp_path / "out").plan
    crash(units, lambda: convert(model(kind), tmp_path / "out", 4, ep=2))
    assert_nothing(tmp_path / "out")
    done = convert(model(kind), tmp_path / "out", 4, ep=2, jobs=2)
    assert done.resumed
    assert 0 < done.bytes_read < whole.read_bytes
    assert digests(tmp_path / "out") == digests(artifact(kind, 4, 2))


@pytest.mark.parametrize("kind", RESHARDED)
def test_a_crashed_reshard_resumes_to_the_same_bytes(artifact: Artifacts, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    crash(20, lambda: reshard(artifact(kind, 4, 4), out, 2, 1))
    assert_nothing(out)
    assert reshard(artifact(kind, 4, 4), out, 2, 1).resumed
    assert digests(out) == digests(artifact(kind, 2, 1))


def test_damage_that_a_crash_parted_from_the_rest_is_refused(own_artifact: Artifacts, tmp_path: Path) -> None:
    """Some experts of a stacked tensor were read before the crash, the damaged one among them."""
    damaged, out = own_artifact("qwen3_moe", 4, 2), tmp_path / "out"
    entry = next(t for t in weights_of(damaged).tensors if t.name.endswith("experts.gate_up_proj.weight"))
    flip(damaged, 0, entry, 3)
    units = 0
    order = prepare_reshard(damaged, 2, 1, out).plan
    names = sorted(order.units, key=lambda u: (order.sources[u[0]].file, order.sources[u[0]].offset))
    units = next(i for i, u in enumerate(names) if ".experts.2.gate_proj" in u[0])
    crash(units, lambda: reshard(damaged, out, 2, 1))
    with pytest.raises(ArtifactError, match=re.escape(entry.name)):
        reshard(damaged, out, 2, 1)
    assert_nothing(out)


def test_a_killed_conversion_resumes_to_the_same_bytes(artifact: Artifacts, model: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("convert", "--model", model("deepseek FP8"), "--tp", 4, "--ep", 2, "--output", out, "--json")
    killed = faulty(Fault("kill", 20, ("write",), "journal"), *options, "--jobs", 2)
    assert killed.code == -signal.SIGKILL, killed.stderr
    assert_nothing(out)
    done = run_msconv(*options, "--jobs", 1)
    assert done.code == 0, done.stderr
    assert done.json["resumed"] is True
    assert digests(out) == digests(artifact("deepseek FP8", 4, 2))

"""Layers proved each by itself, by workers: a sound artifact passes, a fault is found in its layer, and what is
lost is done again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from msconv.mindir.program import Node, Program
from msconv.steps.compile import compile_graphs
from msconv.steps.conversion import run
from msconv.stream.movers.workers import Done, Handing
from msconv.verify import subject as proofs
from msconv.verify.by_layer.driver import WORK, ByLayer
from msconv.verify.by_layer.segments import Carried, keep_caches_apart, segments_of
from msconv.verify.comparison import Comparison
from msconv.verify.prove import prove
from msconv.verify.result import DEVIATIONS, EACH_LAYER, Proof
from msconv_runtime.artifact import STATE_DIR, read_manifest
from msconv_runtime.errors import ResourceError, UsageError
from tests.checkpoints import make_qwen3
from tests.conversions import prepare
from tests.stream.clusters import Threads
from tests.verify.planting import Ranks, edit_weights
from tests.verify.test_mutations import TINY

TARGET = "ascend910b"
LAYERS = [f"model.layers.{i}" for i in range(3)]
SIGN = 0x8000  # of a bfloat16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 artifact for two ranks.  To be read, never changed."""
    directory = tmp_path_factory.mktemp("by-layer")
    artifact = directory / "artifact"
    run(prepare(make_qwen3(directory / "model", "bfloat16", **TINY), 2, output=artifact))
    compile_graphs(artifact, TARGET)
    return artifact


@pytest.fixture
def own(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be changed; few decode steps, as of a large model."""
    monkeypatch.setattr(proofs, "DECODE_STEPS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(root, tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture
def model(root: Path) -> Path:
    return root.parent / "model"


def proved(root: Path, model: Path, cluster: Threads, said: list[str] | None = None) -> Proof:
    by_layer = ByLayer.of(cluster, 1, ([] if said is None else said).append)
    try:
        return prove(root, TARGET, model, by_layer=by_layer)
    finally:
        by_layer.end()


def test_a_sound_artifact_is_proven_and_the_record_says_how(own: Path, model: Path) -> None:
    expected = prove(own, TARGET, model).comparison
    cluster = Threads(["a", "b"])
    proof = proved(own, model, cluster)
    found = proof.comparison
    assert proof.ok, (proof.place, found.worst)
    assert sorted(cluster.moved) in (["a", "a", "b"], ["a", "b", "b"])
    for same in ("rows", "ties", "undecided", "places", "argmax_agreement"):
        assert getattr(found, same) == getattr(expected, same), same
    assert set(found.probes) == set(expected.probes)
    assert set(found.by_phase) == set(expected.by_phase)
    assert list(found.own_errors) == list(found.own_deviations) == LAYERS
    assert 0 < found.deviation_sum < 1e-5
    assert not expected.own_errors
    (entry,) = read_manifest(own).verified
    assert entry.mode == EACH_LAYER
    assert entry.settings[DEVIATIONS] == found.deviation_sum
    assert not list((own / STATE_DIR).glob(f"{WORK}*"))


def negate(name: str, rank: int) -> Callable[[Ranks], None]:
    """The largest weight of one rank's slice has the wrong sign."""

    def change(ranks: Ranks) -> None:
        bits = ranks[rank][name].reshape(-1)
        bits[(bits & ~SIGN).argmax()] ^= SIGN

    return change


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.1.mlp.down_proj.weight", r"model\.layers\.1\.mlp"),
        ("lm_head.weight", r"lm_head"),
    ],
)
def test_one_wrong_weight_of_one_rank_is_found_in_its_layer_and_nowhere_else(
    own: Path, model: Path, name: str, place: str
) -> None:
    edit_weights(own, negate(name, 1))
    proof = proved(own, model, Threads(["a", "b"]))
    assert not proof.ok
    assert re.match(place, proof.place), proof.place
    assert not read_manifest(own).verified
    found = proof.comparison
    number = re.search(r"layers\.(\d)", name)
    faulty = LAYERS[int(number[1]) if number else -1]
    for layer in LAYERS:  # those behind it are given what is right
        assert (found.own_errors[layer] > found.bound) == (layer == faulty), (layer, found.own_errors)


def test_errors_that_add_up_are_refused_though_each_is_within_the_bound() -> None:
    for layers, is_ok in ((LAYERS, False), (LAYERS[:2], True)):
        found = Comparison(1e-4, decided=1, agreeing=1, own_deviations=dict.fromkeys(layers, 0.4e-4))
        assert found.ok == is_ok


def test_layers_of_a_lost_worker_are_done_elsewhere(own: Path, model: Path) -> None:
    expected = proved(own, model, Threads(["a"])).comparison
    lost: list[Any] = []

    def dies(node: str, units: Any) -> bool:
        if node == "a" and not lost:
            cluster.names.remove("a")
            lost.append(units)
        return bool(lost) and node == "a"

    cluster, said = Threads(["a", "b"], dies=dies), list[str]()
    assert proved(own, model, cluster, said).comparison == expected
    assert cluster.moved == ["b"] * 3
    assert "machine a: its worker was lost (killed); what it did is done again." in said


class Killed(Exception):
    """The driver ends here."""


def test_a_driver_that_was_killed_goes_on_with_the_layers_that_are_left(
    own: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "LARGE_BYTES", 0)
    expected = proved(own, model, Threads(["a"])).comparison

    real = Handing.__iter__

    def two(self: Handing) -> Iterator[Done]:
        yield from islice(real(self), 2)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Handing, "__iter__", two)
        proved(own, model, Threads(["a"]))
    cluster = Threads(["a"])
    proof = proved(own, model, cluster)
    assert proof.ok and proof.is_resumed
    assert proof.comparison == expected
    assert cluster.moved == ["a"]


def test_a_node_that_sees_other_files_is_named(own: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"1 of 2 nodes cannot do this proof:\n  machine b: its storage"):
        proved(own, model, Threads(["a", "b"], sees={"b": tmp_path}))


def test_what_cannot_be_cut_is_refused(own: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="--layers compares"):
        prove(own, TARGET, model, layers=1, by_layer=ByLayer.of(Threads(["a"]), 1, print))


def program(*nodes: Node) -> Program:
    return Program({}, {}, ["ids", "a", "b"], list(nodes), nodes[-1].output, None)  # type: ignore[arg-type]


def layer(number: int, cache: str, stream: str, *further: str) -> list[Node]:
    """A norm, a node that writes a cache, and a sum."""
    norm = f"model.layers.{number}.input_layernorm.weight"
    return [
        Node("Mul", (stream,), f"n{number}", {}, None, norm),
        Node("ReshapeAndCache", (f"n{number}", cache, *further), f"w{number}", {}),
        Node("Add", (stream, f"w{number}"), f"s{number + 1}", {}),
    ]


def test_a_layer_is_given_all_that_earlier_ones_have_made() -> None:
    start = Node("Gather", ("ids",), "s0", {})
    sound = program(start, *layer(0, "a", "s0"), *layer(1, "b", "s1"))
    segments = segments_of(sound, 2, "ids", ["a", "b"])
    assert segments is not None
    assert segments[0].left == segments[1].taken == (Carried("s1", 1, False), Carried("n1", 1, True))
    assert keep_caches_apart(sound, segments, ["a", "b"]) == [0, 1]
    inner = program(start, *layer(0, "a", "s0"), *layer(1, "b", "s1", "n0"))  # looks back past the border
    looks_back = segments_of(inner, 2, "ids", ["a", "b"])
    assert looks_back is not None
    assert Carried("n0", 1, False) in looks_back[1].taken  # taken for the residual stream, and so compared with it
    assert Carried("n0", 1, False) in looks_back[0].left
    shared = program(start, *layer(0, "a", "s0"), *layer(1, "a", "s1"))
    found = segments_of(shared, 2, "ids", ["a", "b"])
    assert found is not None and keep_caches_apart(shared, found, ["a", "b"]) is None

"""All calls of a proof together, layer by layer: the same numbers, kept for another run, within a ceiling."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msconv.mindir.program import Node, Program
from msconv.steps.compile import compile_graphs
from msconv.steps.conversion import run
from msconv.verify import lockstep, subject
from msconv.verify.compare import compare
from msconv.verify.comparison import Comparison
from msconv.verify.kept import JOURNAL, Kept, keeping
from msconv.verify.lockstep import Lockstep
from msconv.verify.prove import prove
from msconv.verify.reference import Reference
from msconv.verify.scenario import Lengths, calls_of, play
from msconv.verify.together import keep_caches_apart, layer_ends
from msconv_runtime.artifact import Artifact, read_manifest
from msconv_runtime.errors import ResourceError
from tests.checkpoints import make_qwen3
from tests.conversions import prepare
from tests.verify.test_mutations import TINY

TARGET, VOCAB, POSITIONS, STEPS = "ascend910b", 203, 512, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 artifact for two ranks.  To be read, never changed."""
    directory = tmp_path_factory.mktemp("layers")
    artifact = directory / "artifact"
    run(prepare(make_qwen3(directory / "model", "bfloat16", **TINY), 2, output=artifact))
    compile_graphs(artifact, TARGET)
    return artifact


@pytest.fixture
def reference(root: Path) -> Reference:
    return Reference(root.parent / "model", read_manifest(root))


def numbers(comparison: Comparison) -> dict[str, Any]:
    return dataclasses.asdict(comparison)


def judged(root: Path, reference: Reference, kept: Kept, one: Lockstep | None = None) -> dict[str, Any]:
    one = one or Lockstep(Artifact(root), TARGET)
    reference.kept = kept
    return numbers(compare(one, reference, VOCAB, POSITIONS, steps=STEPS, kept=kept))


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_calls_together_give_what_each_gives_by_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """Bit for bit, with all weights in memory and with a layer's, or none, held."""
    rng = np.random.default_rng(0)
    lengths = Lengths.within(POSITIONS, STEPS, True)
    sequences = [rng.integers(0, VOCAB, n).tolist() for n in lengths.totals]
    apart = list(play(Lockstep(Artifact(root), TARGET), "", sequences, lengths))
    monkeypatch.setattr(lockstep, "KEEP_BYTES", 0)
    together = Lockstep(Artifact(root), TARGET, held_bytes=held)
    assert together.has_layers_apart
    calls = calls_of("", sequences, lengths, True)
    found: list[dict[str, Any]] = [{} for _ in calls]
    for _, pieces in together.together(*together.executions(calls)):
        for piece in pieces:
            found[piece.call] |= piece.probes | piece.outputs
    assert not together.held.arena.used_bytes
    assert len(calls) == len(apart) == 2 + 2 * STEPS + 1
    for call, seen, got in zip(calls, apart, found, strict=True):
        assert (call.phase, call.places, call.rows) == (seen.phase, seen.places, seen.rows)
        expected: dict[str, Any] = {**seen.probes, "logits": seen.logits}
        assert set(expected) <= set(got)
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{call.phase} {name}")


def test_a_head_that_is_the_embedding_is_no_value_that_calls_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every call has a copy of it for each rank: eight layers of Qwen3-4B took above 24 GB, not 5."""
    model = make_qwen3(tmp_path / "model", "bfloat16", **{**TINY, "tie_word_embeddings": True})
    run(prepare(model, 2, output=tmp_path / "artifact"))
    compile_graphs(tmp_path / "artifact", TARGET)
    artifact = Artifact(tmp_path / "artifact")
    (table,) = (tuple(t.shape) for t in artifact.weights.tensors if t.name == "model.embed_tokens.weight")
    monkeypatch.setattr(lockstep, "KEEP_BYTES", 0)
    together = Lockstep(artifact, TARGET)
    lengths = Lengths.within(POSITIONS, STEPS, True)
    calls = calls_of("", [[1] * n for n in lengths.totals], lengths, True)
    executions, names = together.executions(calls)
    for _, _pieces in together.together(executions, names):
        values = [value for e in executions for env in e.values for value in env.values()]
        assert not [v for v in values if isinstance(v, torch.Tensor) and tuple(v.shape) == table]


def test_sequences_in_one_row_do_not_see_each_other(reference: Reference) -> None:
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, VOCAB, n).tolist() for n in (1, 7, 1, 30)]
    packed = reference.traces(sequences)
    for sequence, trace in zip(sequences, packed, strict=True):
        (alone,) = reference.traces([sequence])
        np.testing.assert_allclose(trace.logits, alone.logits, atol=1e-5)  # sums of other shapes
        for name, values in alone.probes.items():
            np.testing.assert_allclose(trace.probes[name], values, atol=1e-5, err_msg=name)


def program(*touched: tuple[int, str]) -> Program:
    """A node that writes a cache and a product with a weight, for each (layer, cache)."""
    nodes, parameters = [], {}
    for i, (layer, cache) in enumerate(touched):
        nodes.append(Node("ReshapeAndCache", ("x", cache), f"k{i}", {}))
        weight = f"model.layers.{layer}.self_attn.o_proj.weight"
        parameters[f"w{i}"] = weight
        nodes.append(Node("MatMul", (f"k{i}", f"w{i}"), f"y{i}", {}, None, weight))
    return Program(parameters, {}, ["x", "a", "b"], nodes, nodes[-1].output, None)  # type: ignore[arg-type]


def test_graphs_that_share_a_cache_between_layers_run_call_by_call() -> None:
    """Else a layer that uses another's cache, all the time, would look right."""
    sound = program((0, "a"), (1, "b"))
    assert layer_ends(sound, 2) == [2, 4, 4]
    assert keep_caches_apart([sound, sound], 2, 2)
    assert not keep_caches_apart([sound, program((0, "a"), (1, "a"))], 2, 2)
    assert not keep_caches_apart([sound, program((0, "b"), (1, "a"))], 2, 2)


class Killed(Exception):
    """The process ends here."""


class EndsAt(Lockstep):
    """Ends when so many layers are done."""

    ends_at = 2

    def together(self, executions: Any, names: Any, begin: int = 0) -> Iterator[Any]:
        for done, pieces in super().together(executions, names, begin):
            yield done, pieces
            if done == self.ends_at:
                raise Killed


def test_a_proof_that_was_killed_goes_on_and_finds_the_same(
    root: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msconv.verify.kept.INTERVAL_S", 0.0)
    expected = judged(root, reference, Kept())
    with pytest.raises(Killed):
        judged(root, reference, Kept(tmp_path), EndsAt(Artifact(root), TARGET))
    layers: list[int] = []
    reference.tell = lambda phase, done, total: layers.append(done)
    begun: list[int] = []
    told = Lockstep(Artifact(root), TARGET)
    real = told.together

    def together(executions: Any, names: Any, begin: int = 0) -> Any:
        begun.append(begin)
        return real(executions, names, begin)

    monkeypatch.setattr(told, "together", together)
    assert judged(root, reference, Kept(tmp_path), told) == expected
    assert layers == [] and begun == [2]
    monkeypatch.setattr(told, "together", lambda *_: pytest.fail("all was done"))
    assert judged(root, reference, Kept(tmp_path), told) == expected


def test_what_was_kept_does_not_count_if_it_was_changed(
    root: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = judged(root, reference, Kept(tmp_path))
    for path in tmp_path.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    layers: list[int] = []
    reference.tell = lambda phase, done, total: layers.append(done)
    assert judged(root, reference, Kept(tmp_path)) == expected
    assert layers == [0, 1, 2]


def test_what_was_kept_is_bound_to_its_identity_and_goes_with_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Killed), keeping(tmp_path, TARGET, {"weights": "a"}) as kept:
        kept.save("x", {}, 1)
        raise Killed
    with pytest.raises(Killed), keeping(tmp_path, TARGET, {"weights": "a"}) as kept:
        assert kept.is_old and kept.load("x") == ({}, 1)
        with keeping(tmp_path, TARGET, {"weights": "a"}) as second:
            assert not second.is_there  # two at a time: the second keeps nothing
        raise Killed
    with keeping(tmp_path, TARGET, {"weights": "b"}) as kept:
        assert not kept.is_old and kept.load("x") is None
        kept.save("x", {}, 2)
    assert not list(tmp_path.rglob(JOURNAL)) and not list(tmp_path.rglob("*.safetensors"))


def test_nothing_is_kept_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("msconv.verify.kept.replace_file", full)
    with keeping(tmp_path, TARGET, {"weights": "a"}) as kept:
        assert not kept.is_there


def test_a_large_proof_keeps_what_it_does_and_says_that_it_resumed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("msconv.verify.kept.INTERVAL_S", 0.0)
    monkeypatch.setattr(subject, "LARGE_BYTES", 0)
    monkeypatch.setattr(lockstep, "KEEP_BYTES", 0)
    monkeypatch.setattr(lockstep, "Lockstep", EndsAt)
    with pytest.raises(Killed):
        prove(root, TARGET, None)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subject, "LARGE_BYTES", 0)
    proof = prove(root, TARGET, None)
    assert proof.ok and proof.is_resumed and proof.seconds_per_gb is None
    assert not list(tmp_path.rglob("*.safetensors"))
    again = prove(root, TARGET, None, max_memory=4 << 30)
    assert again.ok and not again.is_resumed and again.seconds_per_gb
    assert numbers(again.comparison) == numbers(proof.comparison)


def test_a_ceiling_that_cannot_hold_is_refused_with_numbers(root: Path) -> None:
    with pytest.raises(ResourceError, match=r"--max-memory 1,000,000 bytes is too little: .*KiB") as caught:
        prove(root, TARGET, None, max_memory=1_000_000)
    assert caught.value.hint.startswith("Try --max-memory ")
    assert prove(root, TARGET, None, max_memory=int(re.findall(r"(\d+)M", caught.value.hint)[0]) << 20).ok

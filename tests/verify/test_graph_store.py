"""`compile --graphs`: graphs that were compiled once are taken by other artifacts, and only by those they fit."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv.graph.store import GraphStore, key_of
from msconv.graph.store import code_digest as real_code_digest
from msconv.steps import compile as compiling
from msconv.steps.compile import compile_graphs
from msconv_runtime.artifact import Artifact, Graph, digest_bytes
from tests.commands import run_msconv
from tests.conftest import Checkpoints
from tests.conversions import convert
from tests.runtime import mindir_forging as forging

TARGET = "ascend310p"  # three small graphs


@pytest.fixture(scope="module")
def kept(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artifact that was compiled, and where its graphs were left.  To be read, never changed."""
    root, store = (tmp_path_factory.mktemp("store") / name for name in ("artifact", "graphs"))
    convert(checkpoint("untied"), root, dtype="float16")
    made = compile_graphs(root, TARGET, kept=GraphStore(store))
    assert [m.taken for m in made] == [False] * 3
    return root, store


@pytest.fixture
def store(kept: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the kept graphs that the test may change."""
    return Path(shutil.copytree(kept[1], tmp_path / "graphs"))


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that are compiled from now on."""
    names: list[str] = []
    export = compiling.made

    def noted(local: Any) -> Any:
        names.append(local.role.name)
        return export(local)

    monkeypatch.setattr(compiling, "made", noted)
    return names


def graphs_of(root: Path) -> dict[str, bytes]:
    return {g.name: (root / g.path).read_bytes() for g in Artifact(root).manifest.graphs}


def test_another_model_of_the_same_shape_takes_them(
    kept: tuple[Path, Path], checkpoint: Checkpoints, compiles: list[str], tmp_path: Path
) -> None:
    root, store = kept
    other = tmp_path / "other"
    convert(checkpoint("other_seed"), other, dtype="float16")
    done = run_msconv("compile", other, "--target", TARGET, "--graphs", store, "--json")
    assert [g["taken"] for g in done.json["graphs"]] == [True] * 3, done.stderr
    assert not compiles
    assert graphs_of(other) == graphs_of(root)
    assert Artifact(other).manifest.graphs == Artifact(root).manifest.graphs
    assert run_msconv("inspect", other, "--check").code == 0


@pytest.mark.parametrize(
    "change", [{"tp": 2}, {"model": "attention_bias"}, {"model": "tied"}, {"dtype": "float32"}]
)
def test_who_differs_takes_none(
    kept: tuple[Path, Path], checkpoint: Checkpoints, tmp_path: Path, change: dict[str, Any]
) -> None:
    values = {"model": "untied", "dtype": "float16", **change}
    root = tmp_path / "other"
    convert(checkpoint(values.pop("model")), root, **values)
    store = GraphStore(kept[1])
    for role in ("prefill", "decode", "verify"):
        assert store.take(local_of(kept[0], role)) is not None
        assert store.take(local_of(root, role)) is None


def test_another_version_takes_none(kept: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, store = kept
    local = local_of(root)
    assert GraphStore(store).take(local) is not None
    before = key_of(local)
    with monkeypatch.context() as changed:
        changed.setattr("msconv.graph.store.version", lambda name: "2.8.0")
        assert key_of(local) != before
    with monkeypatch.context() as changed:
        changed.setattr("msconv.graph.store.code_digest", lambda: real_code_digest()[::-1])
        assert key_of(local) != before
    assert key_of(replace(local, fused=("swiglu",))) != before
    assert key_of(local) == before


def local_of(root: Path, role: str = "decode") -> Any:
    from msconv.graph.spec import Local
    from msconv.layout.cuts import Mesh
    from msconv_runtime.roles import ROLES
    from msconv_runtime.targets import target_named

    config, types = compiling._stored(Artifact(root), None)
    return Local(config, Mesh(Artifact(root).tp, Artifact(root).ep), target_named(TARGET), ROLES[role], "", types)


def files(store: Path, role: str) -> tuple[Path, Path]:
    """The entry and the MindIR of a role."""
    for path in store.glob("*.json"):
        if msgspec.json.decode(path.read_bytes(), type=Graph).role == role:
            return path, path.with_suffix(".mindir")
    raise AssertionError(role)


def fused_by_its_entry(entry: Path, proto: Path) -> None:
    graph = msgspec.json.decode(entry.read_bytes(), type=Graph)
    entry.write_bytes(msgspec.json.encode(msgspec.structs.replace(graph, fused=["swiglu"])))


def truncated(entry: Path, proto: Path) -> None:
    proto.write_bytes(proto.read_bytes()[:-1])


def no_json(entry: Path, proto: Path) -> None:
    entry.write_bytes(b'{"role": ')


def of_another_role(entry: Path, proto: Path) -> None:
    for path, other in zip((entry, proto), files(entry.parent, "prefill"), strict=True):
        shutil.copyfile(other, path)


def forged(entry: Path, proto: Path) -> None:
    """A graph that names code of its own, with a digest that fits."""
    model = forging.meaning(proto.read_bytes())
    forging.inline_node(model, random.Random(1))
    data = model.SerializeToString()
    graph = msgspec.json.decode(entry.read_bytes(), type=Graph)
    proto.write_bytes(data)
    entry.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(graph, size=len(data), digest=digest_bytes(data)))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncated, "its size or digest differs"),
        (no_json, "is no entry of a graph"),
        (of_another_role, "describes another graph than ascend310p decode"),
        (fused_by_its_entry, "describes another graph than ascend310p decode"),
        (forged, "is not a graph that msconv makes"),
    ],
)
def test_what_is_damaged_or_forged_is_not_taken(
    kept: tuple[Path, Path], store: Path, compiles: list[str], tmp_path: Path, change: Any, words: str
) -> None:
    """It is said, compiled, and put right."""
    root = Path(shutil.copytree(kept[0], tmp_path / "artifact"))
    change(*files(store, "decode"))
    said: list[str] = []
    made = compile_graphs(root, TARGET, said.append, kept=GraphStore(store))
    assert {m.graph.role: m.taken for m in made} == {"prefill": True, "decode": False, "verify": True}
    assert compiles == ["decode"]
    (line,) = said
    assert "not taken, compiled instead" in line
    assert words in line
    assert graphs_of(root) == graphs_of(kept[0])
    assert GraphStore(store).take(local_of(root)) is not None


def test_a_place_that_is_no_directory_is_named(kept: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"")
    done = run_msconv("compile", kept[0], "--target", TARGET, "--graphs", place)
    assert done.code == 5
    assert f"{place}: File exists" in done.stderr
    assert "--graphs may name another directory" in done.stderr

"""Artifacts that a stranger has pushed: what is not ours does not become READY here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from msconv_runtime.artifact import read_manifest, write_manifest
from tests.commands import run_msconv
from tests.hub.server import Hub
from tests.runtime.test_foreign_code import FORGES, Forge, forge

pytestmark = pytest.mark.slow
NAME = "somebody/model-tp1"


def pulled(hub: Hub, artifact: Path, out: Path) -> str:
    """What `pull` says of it, when it refuses."""
    shutil.rmtree(artifact / ".msconv", ignore_errors=True)
    hub.add(NAME, artifact)
    done = run_msconv("pull", NAME, "--output", out)
    assert done.code == 1, done.stderr
    assert not (out / "READY").exists()
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("change", FORGES.values(), ids=list(FORGES))
def test_a_graph_with_a_library_of_its_own(hub: Hub, own_artifact: Path, tmp_path: Path, change: Forge) -> None:
    forge(own_artifact, change, Path("/tmp/evil.so"))
    assert "is not a graph that msconv makes, and was not loaded" in pulled(hub, own_artifact, tmp_path / "out")


def test_a_graph_under_an_invented_target(hub: Hub, own_artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(own_artifact)
    graph = manifest.graphs[0]
    (own_artifact / "graphs/evil").mkdir()
    shutil.copy(own_artifact / graph.path, own_artifact / "graphs/evil/prefill.mindir")
    evil = replace(graph, target="evil", path="graphs/evil/prefill.mindir")
    write_manifest(own_artifact, replace(manifest, graphs=[*manifest.graphs, evil]))
    assert "no such target, known are cpu," in pulled(hub, own_artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "something was downloaded"


def test_another_chat_template(hub: Hub, own_artifact: Path, tmp_path: Path) -> None:
    size = (own_artifact / "generation_config.json").stat().st_size
    (own_artifact / "generation_config.json").write_bytes(b" " * size)
    assert "generation_config.json: file: digest differs" in pulled(hub, own_artifact, tmp_path / "out")


def test_what_the_manifest_does_not_name_is_not_fetched(hub: Hub, own_artifact: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_artifact / ".msconv", ignore_errors=True)
    for name in ("chat_template.jinja", "modeling_evil.py"):
        (own_artifact / name).write_text("evil")
    hub.add(NAME, own_artifact)
    done = run_msconv("pull", NAME, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert not (tmp_path / "out/chat_template.jinja").exists()
    assert not (tmp_path / "out/modeling_evil.py").exists()

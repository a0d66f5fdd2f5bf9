"""Libraries inside an artifact, named by its graphs: no command and no loader opens them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from msconv_runtime.artifact import Artifact, Graph, digest_bytes, read_manifest, write_manifest
from msconv_runtime.artifact.consistency import contradiction
from msconv_runtime.errors import MsconvError
from tests.commands import run_msconv, run_python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")]
LIBRARY = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void begin() {
  if (FILE* f = fopen("MARKER", "w")) fclose(f);
}
extern "C" int Evil(int, void**, int*, long**, const char**, void*, void*) { return 0; }
"""
UNCHECKED = "import sys; from msconv_runtime import Session, binding; binding.check_mindir = lambda *_: None\n"
SESSION = "import sys; from msconv_runtime import Session; Session(sys.argv[1], compiled=False)"
SLOT = """
import os, sys
os.environ["MSCONV_COMPILED"] = "0"
from msconv_runtime.artifact import Artifact
from msconv_runtime.graphs import Place
from msconv_runtime.serving.loading import load
load(Artifact(sys.argv[1]), Place())
"""
Forge = Callable[[Any, Path], None]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A library that leaves a marker when it is opened, and where."""
    directory = tmp_path_factory.mktemp("foreign")
    marker, made = directory / "marker", directory / "evil.so"
    source = directory / "evil.cc"
    source.write_text(LIBRARY.replace("MARKER", str(marker)))
    subprocess.run(["c++", "-shared", "-fPIC", "-o", made, source], check=True)
    done = run_python("import ctypes, sys; ctypes.CDLL(sys.argv[1])", made)
    assert done.code == 0, done.stderr
    assert marker.exists(), "the library leaves no marker: these tests would prove nothing"
    marker.unlink()
    return made, marker


def custom_primitive(model: Any, library: Path) -> None:
    """A node of the prefill graph calls a function of the library, as ours call those of msconv."""
    from mindspore.train import mind_ir_pb2 as pb

    kind = pb.AttributeProto.AttributeType
    p = model.primitives.add(name="Custom:999", op_type="Custom", instance_name="run", prim_type=1)
    for name, value in (("func_name", f"{library}:Evil"), ("func_type", "aot"), ("reg_op_name", "Evil")):
        p.attribute.add(name=name, type=kind.Value("STRING"), s=value.encode())
    for name in ("cpp_infer_shape", "cpp_infer_type"):
        p.attribute.add(name=name, type=kind.Value("BOOL"), i=1)
    target(model).op_type = "REF::Custom:999"


def inline_custom(model: Any, library: Path) -> None:
    """The node carries the operation itself: no primitive is there to be looked at."""
    from mindspore.train import mind_ir_pb2 as pb

    kind = pb.AttributeProto.AttributeType
    node = target(model)
    node.op_type = "Custom"
    for name, value in (("func_name", f"{library}:Evil"), ("func_type", "aot"), ("reg_op_name", "Evil")):
        node.attribute.add(name=name, type=kind.Value("STRING"), s=value.encode())
    for name in ("cpp_infer_shape", "cpp_infer_type"):
        node.attribute.add(name=name, type=kind.Value("BOOL"), i=1)


def target(model: Any) -> Any:
    """The first node that computes from token ids alone."""
    return next(n for n in model.graph.node if len(n.input) == 1 and n.op_type.startswith("REF::"))


FORGES: dict[str, Forge] = {"a primitive": custom_primitive, "an inline node": inline_custom}


def forge(root: Path, change: Forge, library: Path) -> None:
    """The prefill graph names the library; manifest and READY vouch for it."""
    from mindspore.train import mind_ir_pb2 as pb

    manifest = read_manifest(root)
    graphs = []
    for graph in manifest.graphs:
        if graph.role == "prefill":
            path = root / graph.path
            model = pb.ModelProto.FromString(path.read_bytes())
            change(model, library)
            data = model.SerializeToString(deterministic=True)
            path.write_bytes(data)
            forged = replace(graph, size=len(data), digest=digest_bytes(data), kinds={})
            graphs.append(forged)
        else:
            graphs.append(graph)
    write_manifest(root, replace(manifest, graphs=graphs))


@pytest.mark.parametrize("change", FORGES.values(), ids=list(FORGES))
def test_a_graph_that_names_a_library_of_its_own(
    own_artifact: Path, library: tuple[Path, Path], change: Forge
) -> None:
    evil, marker = library
    inside = own_artifact / "graphs" / "evil.so"
    shutil.copy(evil, inside)
    forge(own_artifact, change, inside)
    for line in (
        ("verify", own_artifact),
        ("inspect", own_artifact, "--check"),
        ("inspect", own_artifact),
        ("serve", own_artifact, "--print-command"),
    ):
        done = run_msconv(*line)
        assert done.code in (1, 3), (line, done.stderr)
        assert "is not a graph that msconv makes, and was not loaded" in done.stderr, line
        assert "Traceback" not in done.stderr
        assert not marker.exists(), f"{line[0]} opened the library"
    done = run_msconv("doctor", own_artifact)
    assert done.code == 4
    assert "is not a graph that msconv makes, and was not loaded" in done.stdout
    for code in (SESSION, SLOT):
        ran = run_python(code, own_artifact)
        assert ran.code
        assert "is not a graph that msconv makes, and was not loaded" in ran.stderr
        assert not marker.exists(), code
    # what was refused is no harmless thing: without the check, MindSpore opens the library
    run_python(UNCHECKED + SESSION, own_artifact)
    assert marker.exists(), "MindSpore did not open it: the test proves nothing"
    marker.unlink()


def test_a_library_under_an_invented_target(own_artifact: Path, library: tuple[Path, Path]) -> None:
    """The way in: whatever is listed as a graph is downloaded and kept."""
    evil, marker = library
    path = own_artifact / "graphs" / "evil" / "prefill.mindir"
    path.parent.mkdir()
    shutil.copy(evil, path)
    forge(own_artifact, custom_primitive, path)
    manifest = Artifact(own_artifact).manifest
    data = path.read_bytes()
    listed = replace(
        manifest.graphs[0],
        target="evil",
        path="graphs/evil/prefill.mindir",
        size=len(data),
        digest=digest_bytes(data),
    )
    write_manifest(own_artifact, replace(manifest, graphs=[*manifest.graphs, listed]))
    for line in (
        ("verify", own_artifact),
        ("inspect", own_artifact, "--check"),
        ("doctor", own_artifact),
        ("serve", own_artifact, "--print-command"),
        ("report", own_artifact),
    ):
        done = run_msconv(*line)
        assert done.code, line
        assert "no such target, known are cpu," in done.stderr + done.stdout, line
        assert not marker.exists(), f"{line[0]} opened the library"


@pytest.mark.parametrize(
    "path",
    [
        "graphs/cpu/../../../x.mindir",
        "/graphs/cpu/x.mindir",
        "graphs/ascend910b/x.mindir",
        "graphs/cpu/x.so",
        "READY",
        "graphs/cpu/x.mindir\0",
        "graphs/cpu/\u2025.mindir",
        "weights/x.mindir",
        "",
        "graphs/cpu/x.mindir/",
    ],
)
def test_a_graph_somewhere_else(compiled: Path, path: str) -> None:
    manifest = read_manifest(compiled)
    graphs = [replace(manifest.graphs[0], path=path), *manifest.graphs[1:]]
    assert "where no graph of its target is" in contradiction(replace(manifest, graphs=graphs))


def test_a_pipe_in_the_place_of_a_graph(own_artifact: Path) -> None:
    """Opening it would wait for ever."""
    manifest = read_manifest(own_artifact)
    graph: Graph = manifest.graphs[0]
    (own_artifact / graph.path).unlink()
    os.mkfifo(own_artifact / graph.path)
    done = run_msconv("inspect", own_artifact, timeout=60)
    assert done.code == 1
    assert "is no regular file" in done.stderr


def test_a_device_in_the_place_of_the_manifest(own_artifact: Path) -> None:
    (own_artifact / "msconv.json").unlink()
    (own_artifact / "msconv.json").symlink_to("/dev/zero")
    with pytest.raises(MsconvError, match="no regular file"):
        read_manifest(own_artifact)

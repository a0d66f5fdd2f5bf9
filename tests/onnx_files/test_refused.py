"""What ONNX files are not made or run of: one message each, and nothing half-written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from msconv.cli.inspect import next_command
from msconv.graph.spec import CannotCompute, Fixed
from msconv.share.parts import is_part, parts, signed_names
from msconv.steps.compile import compile_graphs
from msconv.verify.prove import prove
from msconv_runtime import Session
from msconv_runtime.artifact import Artifact, Manifest
from msconv_runtime.doctor import Machine, examine
from msconv_runtime.errors import ArtifactError, EnvironmentProblem, MsconvError, UsageError
from msconv_runtime.serving.choice import target_to_serve
from tests.checkpoints import make_qwen3, read_tree
from tests.commands import Result, run_msconv
from tests.conversions import convert
from tests.onnx_files.making import with_graphs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("source"), num_hidden_layers=1, dtype="bfloat16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_graphs(tmp_path_factory.mktemp("made"), "qwen3", None, num_hidden_layers=2)[1]


def refused(root: Path, kind: type[MsconvError], match: str, **options: object) -> MsconvError:
    before = read_tree(root)
    with pytest.raises(kind, match=match) as found:
        compile_graphs(root, "onnx", **options)  # type: ignore[arg-type]
    assert read_tree(root) == before
    return found.value


def test_several_ranks_are_sent_to_reshard(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "two", tp=2)
    found = refused(tmp_path / "two", CannotCompute, "this artifact is of 2")
    assert found.hint is not None
    assert "msconv reshard ARTIFACT --tp 1" in found.hint


def test_codes_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "int8", quant="w8a8")
    found = refused(tmp_path / "int8", CannotCompute, r"self_attn\.qkv_proj\.weight is stored as int8")
    assert found.hint is not None
    assert "--quant" in found.hint


def test_the_missing_package_is_named_with_its_extra(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (lambda: compile_graphs(root, "onnx"), lambda: prove(root, "onnx", None)):
        with pytest.raises(EnvironmentProblem, match="onnx cannot be imported") as found:
            call()
        assert found.value.hint == 'Install it: pip install "msconv[onnx]".'


def test_weights_must_be_there_first(source: Path, tmp_path: Path) -> None:
    done = run_msconv("compile", "--model", source, "--tp", 1, "--target", "onnx", "--output", tmp_path / "bare")
    assert done.code == 2
    assert "point at the weights; convert first" in done.stderr
    assert not (tmp_path / "bare").exists()
    done = run_msconv("compile", "--model", source, "--tp", 1, "--target", "cpu", "--output", tmp_path / "bare")
    assert done.code == 0, done.stderr
    refused(tmp_path / "bare", CannotCompute, "there are none yet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--onnx-static",), "goes with --target onnx"),
        (("--target", "onnx", "--onnx-shapes", "1x2x3"), "goes with --onnx-static"),
        (("--target", "onnx", "--onnx-static", "--onnx-shapes", "1x8"), "are no shapes"),
    ],
)
def test_flags_that_do_not_fit(words: tuple[str, ...], message: str, root: Path) -> None:
    done = run_msconv("compile", root, *words)
    assert done.code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    "shapes", ["1x0x8", "1x8", "1x9x8", "1x8x4096", "5000x1x1", "axbxc", "1x8x1_024", "-1x8x8", "1x8x8 ", "1X8X8"]
)
def test_shapes_that_are_none(shapes: str) -> None:
    with pytest.raises(UsageError, match="are no shapes"):
        Fixed.of(shapes, 2048)


def test_usual_shapes_fit_the_model() -> None:
    assert Fixed.of("", 2048) == Fixed(1, 128, 1024)
    assert Fixed.of("", 100) == Fixed(1, 100, 100)
    assert Fixed.of("3x8x16", 100) == Fixed(3, 8, 16)


def test_msconv_does_not_serve_it(root: Path) -> None:
    artifact = Artifact(root)
    for named in ("onnx", None):
        with pytest.raises((UsageError, ArtifactError), match="onnx") as found:
            target_to_serve(artifact, "cpu", named)
        assert "onnxruntime-genai loads" in found.value.message + (found.value.hint or "")
    with pytest.raises(EnvironmentProblem, match="onnx graphs run in an ONNX runtime"):
        Session(root, "onnx")
    for words in (("--target", "onnx"), ()):
        done: Result = run_msconv("serve", root, "--print-command", *words)
        assert done.code != 0
        assert "onnxruntime-genai loads" in done.stderr
        assert "Traceback" not in done.stderr


def test_doctor_knows_it(root: Path) -> None:
    names = {f.name: f for f in examine(Machine(), root).findings}
    assert names["graphs onnx"].state == "ok", names["graphs onnx"]
    assert "mixed of onnx 1." in names["graphs onnx"].found
    assert names["proof onnx"].found == "UNPROVEN"
    assert "graphs ascend910b" in names  # what it could have for devices that msconv serves
    (root / "model.onnx").rename(root / "away.onnx")
    try:
        damaged = [f for f in examine(Machine(), root).findings if f.name == "file" and f.state == "wrong"]
        assert any("model.onnx" in f.found and not f.stops for f in damaged)
    finally:
        (root / "away.onnx").rename(root / "model.onnx")


def test_inspect_and_report_say_what_it_is(root: Path) -> None:
    done = run_msconv("inspect", root)
    assert "graph: onnx mixed: " in done.stdout
    assert "KiB, onnx 1." in done.stdout
    page = run_msconv("report", root, "--json").json
    (graphs,) = page["graphs"]
    assert graphs["target"] == "onnx"
    assert not any("serve" in use["line"] for use in page["use"])


def test_nothing_is_said_to_serve_what_others_serve(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Artifact(root).manifest
    assert next_command(root, manifest).endswith("--target onnx")
    monkeypatch.setattr(Manifest, "proof_for", lambda *_: "a proof")
    assert next_command(root, manifest) == ""


def test_push_and_pull_know_its_files(root: Path) -> None:
    """And no other file of that kind."""
    sizes = parts(Artifact(root).manifest)
    assert sizes["model.onnx"] == (root / "model.onnx").stat().st_size
    assert {"model.onnx", "genai_config.json"} <= set(signed_names(root, Artifact(root).manifest))
    assert is_part("decode_static.onnx")
    assert not is_part("weights/model.onnx")
    assert not is_part("../model.onnx")


def test_layers_are_not_looked_at_one_by_one(root: Path) -> None:
    done = run_msconv("verify", root, "--target", "onnx", "--layers", 1, "--reference", root.parent / "source")
    if done.code != 2:
        pytest.fail(done.stdout + done.stderr)


def test_its_layers_are_not_divided_among_machines(root: Path) -> None:
    with pytest.raises(UsageError, match="--ray: an ONNX graph is run as a whole"):
        prove(root, "onnx", None, by_layer=lambda *_: pytest.fail("was asked"))

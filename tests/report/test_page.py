"""report.html as text: every value is data, every string is escaped, and commands keep it up to date."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv.families import DecoderConfig
from msconv.report.data import describe
from msconv.report.render import error, percent, render, short, size
from msconv_runtime.artifact import Dropped, Manifest, digest_bytes
from tests.checkpoints import read_tree
from tests.commands import run_msconv
from tests.conftest import Checkpoints
from tests.report.manifests import manifest_of
from tests.report.pages import Page, resolve, says
from tests.warm import run_warm

EVIL = "<script>alert(1)</script>\"'&</script><!--<img src=x onerror=alert(2)>{{ 7*7 }}"
LARGE = ("DeepSeek-V3", 16, 16, ("ascend910b", "ascend910c", "cpu"))


def page_of(*args: Any, **options: Any) -> Page:
    manifest, config = manifest_of(*args, **options)
    return Page(render(describe(manifest, config, {})))


def evil(manifest: Manifest, config: DecoderConfig) -> dict[str, Any]:
    """The data of a manifest in which every name came from somebody who means harm."""
    assert manifest.weights is not None
    replace = msgspec.structs.replace
    first, *others = manifest.weights.tensors
    weights = replace(
        manifest.weights,
        tensors=[replace(first, name=EVIL), *others],
        dropped=[Dropped(EVIL, 3, EVIL)],
        source_dtype=EVIL,
        quant=EVIL,
        made=EVIL,
    )
    graphs = [replace(g, mindspore=EVIL, target=EVIL, kinds={EVIL: 3}, path=EVIL) for g in manifest.graphs]
    proof = replace(manifest.verified[0], target=EVIL, reference=EVIL, mode=EVIL, settings={EVIL: 1e-6})
    model = replace(manifest.model, source=EVIL, architecture=EVIL, commit=EVIL)
    changed = replace(manifest, tool=EVIL, model=model, weights=weights, graphs=graphs, verified=[proof])
    return describe(changed, config, {})


@pytest.fixture(params=["real", "large", "unproven", "graphs only", "weights only", "dense", "int8"])
def page(request: pytest.FixtureRequest) -> Page:
    if request.param == "real":
        proven: Path = request.getfixturevalue("proven")
        return Page((proven / "report.html").read_text())
    return {
        "large": lambda: page_of(*LARGE),
        "unproven": lambda: page_of("Qwen3-30B-A3B", 4, 4, ("cpu", "ascend310p"), proven=False),
        "graphs only": lambda: page_of("Qwen3-32B", 8, 1, ("ascend910b",), weights=False),
        "weights only": lambda: page_of("Qwen3-235B-A22B", 16, 8),
        "dense": lambda: page_of("Qwen3-0.6B", 1, 1, ("cpu",)),
        "int8": lambda: page_of("DeepSeek-V3", 16, 16, ("ascend910b",), quant="w8a8"),
    }[request.param]()


def test_every_value_is_in_the_data_and_is_shown_as_it_is(page: Page) -> None:
    assert len(page.shown) > 60
    for shown in page.shown:
        value = resolve(page.data, shown.pointer)
        if isinstance(value, str):
            assert shown.text == value, shown
        else:
            assert not isinstance(value, bool)
            assert json.loads(shown.value or "") == value, shown
            assert says(shown.text, value), (shown, value)


def test_there_is_no_number_besides(page: Page) -> None:
    assert not re.findall(r".{0,30}\d.{0,30}", page.words)


def test_the_raw_data_is_the_embedded_data(page: Page) -> None:
    assert json.loads(page.raw) == page.data


def test_the_page_names_nothing_outside_itself(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert "src" not in attributes
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
        assert tag != "script" or attributes.get("type") == "application/json"
    assert not re.search(r"@import|https?:|url\((?!#)", page.source.split("</style>")[0])


def test_the_policy_allows_only_this_very_style(page: Page) -> None:
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    style = page.source.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policies == [f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"]


def test_a_reader_without_eyes_finds_headings_tables_and_names(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption") > 1
    assert all(a.get("scope") in ("row", "col") for t, a in page.tags if t == "th")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
    regions = [a.get("aria-label") for _, a in page.tags if a.get("role") == "region"]
    assert len(set(regions)) == len(regions)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {a["href"] for t, a in page.tags if t == "a"} <= {f"#{i}" for i in ids}


def test_a_model_of_hostile_names_is_shown_and_does_nothing() -> None:
    data = evil(*manifest_of("Qwen3-30B-A3B", 2, 2, ("cpu",)))
    page = Page(render(data))
    assert page.data == data
    assert json.loads(page.raw) == data
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [a for t, a in page.tags if t == "img" or "onerror" in a]
    assert "49" not in page.words
    texts = [s.text for s in page.shown]
    assert texts.count(EVIL) >= 8
    assert "alert" not in page.words


def test_a_large_model_is_a_small_page() -> None:
    page = page_of(*LARGE)
    assert len(page.source.encode()) < 600_000
    assert page.data["model"]["experts"] == 256
    many = page_of("DeepSeek-V3", 128, 128, ("ascend910b", "ascend910c", "ascend310p", "cpu"))
    assert len(many.source.encode()) < 1_000_000


def test_one_is_not_called_many() -> None:
    shown = re.sub(r"<[^>]+>", "", render(describe(*manifest_of("Qwen3-0.6B", 1, 1, ("cpu",)), {})))
    assert "float32, 1 rank:" in shown and "There is 1 rank." in shown and "in 1 file\n" in shown
    assert not re.search(r"\b1 (ranks|files|groups)\b", shown)


def test_unmeasured_cells_say_so() -> None:
    page = page_of("Qwen3-0.6B", 1, 1, ("cpu",), proven=False)
    assert page.source.count(">n/m<") == 3  # embedding; attention and MLP of all layers
    assert "Nothing was measured" in page.words
    assert ">n/m<" not in page_of("Qwen3-0.6B", 1, 1, ("cpu",)).source


@pytest.mark.parametrize(
    ("shown", "value"),
    [
        (size(1536), 1536),
        (size(80.19 * 2**30), 80.19 * 2**30),
        (size(3 * 2**50), 3 * 2**50),
        (percent(0.000012), 0.000012),
        (percent(0.9988), 0.9988),
        (percent(1.2549), 1.2549),
        (percent(0), 0),
        (short(671_026_419_200), 671_026_419_200),
        (error(7.53e-6), 7.53e-6),
        (error(0.875), 0.875),
        (error(0), 0),
    ],
)
def test_a_formatted_number_is_told_from_another(shown: str, value: float) -> None:
    assert says(shown, value)
    assert not says(shown, value * 1.2 + 1e-3)


# What commands do with it


@pytest.mark.slow
def test_convert_compile_and_verify_bring_it_up_to_date(stages: dict[str, Path]) -> None:
    pages = {name: Page((root / "report.html").read_text()) for name, root in stages.items()}
    states = {name: page.data["verdict"]["state"] for name, page in pages.items()}
    assert states == {
        "convert": "no graphs",
        "compile": "unproven",
        "verify": "partly proven",
        "verify all": "proven",
    }
    assert pages["convert"].data["coverage"] == {**pages["compile"].data["coverage"], "targets": []}


@pytest.mark.slow
def test_a_proof_that_fails_takes_the_verdict_back(proven: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(proven, tmp_path / "own"))
    part = root / "weights/model-rank-1-part-0.safetensors"
    data = bytearray(part.read_bytes())
    data[-9] ^= 1
    part.write_bytes(data)
    assert run_warm("verify", root, "--target", "cpu").code == 3
    assert Page((root / "report.html").read_text()).data["verdict"]["state"] == "partly proven"


@pytest.mark.slow
def test_the_command_prints_where_it_is_or_what_it_says(proven: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(proven, tmp_path / "own"))
    before = (root / "report.html").read_bytes()
    (root / "report.html").unlink()
    done = run_msconv("report", root)
    assert done.stdout == f"{root / 'report.html'}\n"
    assert (root / "report.html").read_bytes() == before
    assert run_msconv("report", root, "--json").json == Page(before.decode()).data
    elsewhere = tmp_path / "page.html"
    assert run_msconv("report", root, "--output", elsewhere).stdout == f"{elsewhere}\n"
    assert elsewhere.read_bytes() == before
    assert run_msconv("inspect", root, "--check", "--json").json["check"]["ok"] is True


def test_a_page_replaces_nothing_but_a_page(compiled: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(compiled, tmp_path / "own"))
    (root / "report.html").unlink(missing_ok=True)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    os.mkfifo(root / "report.html")
    before = {name: (root / name).read_bytes() for name in ("msconv.json", "READY", "config.json")}
    within = [root / name for name in (*before, "page.html", "weights/page.html")]
    for output in (None, pipe, *within):
        done = run_msconv("report", root, *(("--output", output) if output else ()))
        assert done.code == 2, output
        assert "nothing was written" in done.stderr
    assert {name: (root / name).read_bytes() for name in before} == before
    assert not list(root.rglob("page.html"))


def test_the_command_says_where_it_cannot_write(compiled: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "not" / "there.html", tmp_path):
        done = run_msconv("report", compiled, "--output", output)
        assert done.code == 2
        assert "Traceback" not in done.stderr
        assert str(output) in done.stderr
    done = run_msconv("report", tmp_path)
    assert done.code == 1
    assert "not an artifact" in done.stderr


def test_the_same_artifact_has_the_same_page_wherever_it_lies(checkpoint: Checkpoints, tmp_path: Path) -> None:
    for name, jobs in (("a", 1), ("b/c", 2)):
        out = tmp_path / name
        done = run_msconv("convert", "--model", checkpoint("tied"), "--tp", 2, "--output", out, "--jobs", jobs)
        assert done.code == 0
    assert read_tree(tmp_path / "a") == read_tree(tmp_path / "b" / "c")
    pages = [(tmp_path / name / "report.html").read_text() for name in ("a", "b/c")]
    assert pages[0] == pages[1]
    assert str(tmp_path) not in pages[0]


def test_converting_again_mends_a_lost_page_and_leaves_a_good_one(checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = ("convert", "--model", checkpoint("untied"), "--tp", 1, "--output", tmp_path / "out")
    assert run_msconv(*options).code == 0
    path = tmp_path / "out" / "report.html"
    written, page = path.stat().st_mtime_ns, path.read_bytes()
    assert run_msconv(*options).code == 0
    assert path.stat().st_mtime_ns == written
    path.unlink()
    assert run_msconv(*options).code == 0
    assert path.read_bytes() == page
    path.write_text("other")
    assert run_msconv(*options, "--force").code == 0
    assert path.read_bytes() == page
    assert (tmp_path / "out" / "READY").stat().st_mtime_ns >= path.stat().st_mtime_ns  # READY is the last


def test_a_page_that_cannot_be_written_is_a_warning(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".msconv").mkdir(parents=True)
    (out / "report.html").mkdir()
    done = run_msconv("convert", "--model", checkpoint("untied"), "--tp", 1, "--output", out)
    assert done.code == 0
    assert "Warning: " in done.stderr
    assert "report.html was not written" in done.stderr
    assert (out / "READY").is_file()
    assert not list(out.glob("report.html.tmp"))
    assert run_msconv("inspect", out, "--check").code == 0


def test_resharding_writes_the_page_of_a_direct_conversion(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("untied")
    assert run_msconv("convert", "--model", model, "--tp", 1, "--output", tmp_path / "one").code == 0
    assert run_msconv("convert", "--model", model, "--tp", 2, "--output", tmp_path / "two").code == 0
    assert run_msconv("reshard", tmp_path / "one", "--tp", 2, "--output", tmp_path / "again").code == 0
    pages = [(tmp_path / name / "report.html").read_bytes() for name in ("two", "again")]
    assert pages[0] == pages[1]


def test_an_artifact_of_before_shows_what_was_recorded(own_artifact: Path) -> None:
    """Manifests without kinds of nodes, as earlier versions wrote them."""
    path = own_artifact / "msconv.json"
    manifest = json.loads(path.read_bytes())
    for graph in manifest["graphs"]:
        del graph["kinds"]
    data = json.dumps(manifest).encode()
    path.write_bytes(data)
    (own_artifact / "READY").write_text(digest_bytes(data))
    (own_artifact / ".msconv" / "timings.json").unlink()
    assert run_msconv("report", own_artifact).code == 0
    page = Page((own_artifact / "report.html").read_text())
    assert "compile again to see them" in page.words
    assert page.words.count("not recorded") >= 2

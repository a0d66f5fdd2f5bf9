"""report.html in a real Chromium: silent, alone, readable in any light, on a phone, on paper and aloud."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from msconv.report.data import describe
from msconv.report.render import render
from tests.report.browser import Browser, contrast, open_browser
from tests.report.manifests import manifest_of
from tests.report.test_page import evil

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of models that were never made: a large one, one of hostile names, one that has everything unsaid."""
    root = tmp_path_factory.mktemp("pages")
    manifest, config = manifest_of("Qwen3-30B-A3B", 2, 2, ("cpu",))
    unproven = manifest_of("Qwen3-32B", 8, 1, ("ascend910b", "cpu"), proven=False)
    found = {
        "large": describe(*manifest_of("DeepSeek-V3", 16, 16, ("ascend910b", "ascend910c", "cpu")), {}),
        "hostile": evil(manifest, config),
        "unproven": describe(*unproven, {}),
    }
    for name, data in found.items():
        (root / f"{name}.html").write_text(render(data))
    return {name: root / f"{name}.html" for name in found}


@pytest.fixture(params=["real", "large", "hostile", "unproven"])
def page(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    if request.param == "real":
        proven: Path = request.getfixturevalue("proven")
        return proven / "report.html"
    return pages[request.param]


def pixels(png: bytes) -> np.ndarray:  # type: ignore[type-arg]
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=np.float64)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_without_an_error_or_a_request(
    browser: Browser, page: Path, scheme: str, width: int
) -> None:
    browser.show(page, scheme, width)
    assert browser.requests() == [page.as_uri()]
    assert browser.console() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return typeof window.alerted") == "undefined"
    outside = browser.run(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []


def test_a_browser_that_is_blocked_says_so(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """The checks above would notice: a page with a script and an image is refused by its own policy, aloud."""
    bad = "<script>window.alerted = 1</script><img src='http://127.0.0.1:9/x.png'><p style='color: red'>x</p>"
    (tmp_path / "bad.html").write_text(pages["unproven"].read_text().replace("</main>", bad + "</main>"))
    browser.show(tmp_path / "bad.html")
    assert len(browser.console()) >= 3
    assert browser.run("return typeof window.alerted") == "undefined"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("media", ["screen", "print"])
def test_every_text_stands_out_from_what_is_behind_it(
    browser: Browser, page: Path, scheme: str, media: str
) -> None:
    browser.show(page, scheme, media=media)
    texts = browser.texts()
    assert len(texts) > 100
    weak = [(text, ink, paper) for text, ink, paper in texts if contrast(ink, paper) < 4.5]
    assert not weak


def test_light_is_light_dark_is_dark_and_paper_is_white(browser: Browser, page: Path) -> None:
    means = {}
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        browser.show(page, scheme, media=media)
        means[scheme, media] = pixels(browser.screenshot()).mean()
    assert means["light", "screen"] > 225
    assert means["dark", "screen"] < 70
    assert means["dark", "print"] > 225


def test_the_page_prints_on_a_few_sheets(browser: Browser, page: Path) -> None:
    browser.show(page, "dark")
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
    browser.show(page, media="print")
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("return getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    # an A4 sheet's width in CSS pixels, less the margins
    browser.show(page, media="print", width=688)
    heat = browser.run("return Math.max(...[...document.querySelectorAll('.heat')].map(e => e.scrollWidth))")
    assert 0 < heat <= 688


def test_a_screen_reader_is_told_what_everything_is(browser: Browser, page: Path) -> None:
    browser.show(page)
    found = browser.accessible()
    roles = [role for role, _ in found]
    for role in ("heading", "table", "region", "link", "image", "navigation", "rowheader", "columnheader"):
        named = [name for r, name in found if r == role]
        assert named or role == "image", role
        assert all(named), role
    assert {"main", "banner", "RootWebArea"} <= set(roles)
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.run("return document.title")
    headings = [name for role, name in found if role == "heading"]
    for section in ("Provenance", "Memory of each rank", "Verification", "Coverage", "Graphs", "Raw data"):
        assert section in headings


def test_the_heat_map_is_told_by_more_than_colour(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["large"])
    cells = browser.run("return [...document.querySelectorAll('.heat td')].map(e => [e.className, e.innerText])")
    assert len(cells) == 3 * (1 + 2 * 61)
    assert all(re.fullmatch(r"\d\.\de-\d", text) for _, text in cells)
    shades = browser.run(
        "return [...document.querySelectorAll('.legend')][0].querySelectorAll('.key').length && "
        "[...document.querySelectorAll('.legend')[0].querySelectorAll('.key')].map(e => "
        "getComputedStyle(e).backgroundColor)"
    )
    steps = [contrast(colour, "rgb(255, 255, 255)") for colour in shades[:5]]
    assert steps == sorted(steps)  # one after the other darker: the order holds without hues
    browser.show(pages["unproven"])
    cells = browser.run("return [...document.querySelectorAll('.heat td')].map(e => e.innerText)")
    assert set(cells) == {"n/m"}


def test_the_raw_data_opens_without_a_script(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["unproven"])
    assert not browser.run("return document.querySelector('#raw pre').checkVisibility()")
    browser.run("document.querySelector('#raw summary').click()")
    assert browser.run("return document.querySelector('#raw pre').checkVisibility()")
    same = "return JSON.stringify(JSON.parse(document.querySelector('#raw pre').textContent)) === "
    same += "JSON.stringify(JSON.parse(document.getElementById('report-data').textContent))"
    assert browser.run(same)


def test_without_chromium_the_tests_fail_and_say_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MSCONV_NO_BROWSER", raising=False)
    with pytest.raises(pytest.fail.Exception, match="make browser"), open_browser(tmp_path):
        pass
    monkeypatch.setenv("MSCONV_NO_BROWSER", "1")
    with pytest.raises(pytest.skip.Exception), open_browser(tmp_path):
        pass

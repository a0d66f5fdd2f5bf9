"""A real Chromium without a screen, and what it has to say about a page."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Of every element with text of its own: what it says, its colour, the colour behind it; of SVG text, the fill of
# the rectangle before it.
TEXTS = """
const transparent = c => c === 'transparent' || c === 'rgba(0, 0, 0, 0)';
const behind = e => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor; if (!transparent(c)) return c; } return 'rgb(255, 255, 255)'; };
return [...document.body.querySelectorAll('*')].filter(e => e.checkVisibility() && e.getClientRects().length &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
  const style = getComputedStyle(e), svg = e.tagName === 'text';
  return [e.textContent.trim().slice(0, 40), svg ? style.fill : style.color,
          svg ? getComputedStyle(e.previousElementSibling).fill : behind(e)]; });
"""


class Browser:
    """One window.  `driver`: selenium's."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def show(self, page: Path, scheme: str = "light", width: int = 1280, media: str = "screen") -> None:
        """Load the page as somebody with that taste and that screen, or on paper, would see it."""
        self.visit(page.as_uri(), scheme, width, media)

    def visit(self, url: str, scheme: str = "light", width: int = 1280, media: str = "screen") -> None:
        """The same by its address."""
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.cdp(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.driver.get(url)

    def console(self) -> list[dict[str, Any]]:
        return list(self.driver.get_log("browser"))

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page began to load."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def texts(self) -> list[tuple[str, str, str]]:
        """(text, colour, colour behind it) of everything that can be read."""
        return [(text, ink, paper) for text, ink, paper in self.run(TEXTS)]

    def accessible(self) -> list[tuple[str, str]]:
        """(role, name) of what a screen reader is told."""
        nodes = self.cdp("Accessibility.getFullAXTree")["nodes"]
        return [
            (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored", False)
        ]

    def screenshot(self) -> bytes:
        return self.driver.get_screenshot_as_png()  # type: ignore[no-any-return]

    def pdf(self) -> bytes:
        made = self.cdp("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(made["data"])


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Fails if there is no Chromium; skips only where that was asked for."""
    if os.environ.get("MSCONV_NO_BROWSER"):
        pytest.skip("MSCONV_NO_BROWSER is set")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.fail(
            "The report is tested in a real Chromium and there is none: `make browser` installs it "
            "(apt-get install chromium chromium-driver); MSCONV_NO_BROWSER=1 leaves these tests out."
        )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of two colours as CSS computes them, `rgb(1, 2, 3)`."""

    def luminance(colour: str) -> float:
        values = [int(v) / 255 for v in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)

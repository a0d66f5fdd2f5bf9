"""The data as one page: no script, no request, every string escaped.

Each value on the page is an element that names its place in the data (`data-json`, a JSON pointer), numbers as
`<data value=...>` with the exact value; the template has no numbers of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from msconv_runtime.units import human_bytes

from .groups import ORDER

HERE = Path(__file__).parent
LETTERS = dict(zip(ORDER, "EADXSRHNICOK", strict=True))  # on the bars: colour is never alone


class Figure:
    """A number and where it stands in the data."""

    __slots__ = ("path", "value")

    def __init__(self, value: int | float, path: str) -> None:
        self.value, self.path = value, path

    def __html__(self) -> str:
        return self.shown(count(self.value))

    def __bool__(self) -> bool:
        return bool(self.value)

    def shown(self, text: str) -> Markup:
        element = '<data value="{}" data-json="{}">{}</data>'
        return Markup(element).format(json.dumps(self.value), self.path, text)


class Words(str):
    """A string and where it stands in the data."""

    path: str

    def __html__(self) -> str:
        return str(Markup('<span data-json="{}">{}</span>').format(self.path, str(self)))


def render(data: dict[str, Any]) -> str:
    """The page.  The same data gives the same text."""
    css = (HERE / "style.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    raw = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    embedded = raw.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = _template().render(
        located(data), css=Markup(css), style_digest=digest, raw=raw, embedded=Markup(embedded)
    )
    return page.lstrip() + "\n"


def located(value: Any, path: str = "") -> Any:
    """The same data, in which numbers and strings know their place."""
    if isinstance(value, dict):
        return {k: located(v, f"{path}/{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [located(v, f"{path}/{i}") for i, v in enumerate(value)]
    if isinstance(value, str):
        words = Words(value)
        words.path = path
        return words
    return value if value is None or isinstance(value, bool) else Figure(value, path)


def count(n: float) -> str:
    """12,345; of what is no whole number, three digits."""
    return f"{n:,}" if isinstance(n, int) else f"{n:.3g}"


def short(n: float) -> str:
    """1.23 billion."""
    for size, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if n >= size:
            return f"{n / size:.3g}\u00a0{name}"
    return count(n)


def size(n: float) -> str:
    """Bytes: 1.50 GiB."""
    return human_bytes(n, space="\u00a0")


def percent(share: float) -> str:
    """Three digits; what is more than nothing never looks like nothing."""
    value = share * 100
    return (
        "under 0.01\u00a0%"
        if 0 < value < 0.01
        else f"{value:.3g}\u00a0%"
        if value < 100
        else f"{value:.0f}\u00a0%"
    )


def error(value: float) -> str:
    """1.2e-6."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def seconds(value: float) -> str:
    return f"{value:.1f}\u00a0s"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for formatted in (short, size, percent, error, seconds):
        environment.filters[formatted.__name__] = lambda figure, f=formatted: figure.shown(f(figure.value))
        environment.filters[f"{formatted.__name__}_text"] = lambda figure, f=formatted: f(figure.value)
    environment.filters["text"] = lambda words: str(words)  # for attributes
    environment.filters["letter"] = lambda group: LETTERS[str(group)]
    environment.filters["hue"] = lambda group: f"g{ORDER.index(str(group))}"
    environment.filters["of"] = _of
    return environment.get_template("template.html.j2")


def _of(part: Figure | float, whole: Figure | float) -> float:
    """A percentage for drawing."""
    a, b = (v.value if isinstance(v, Figure) else v for v in (part, whole))
    return round(100 * a / b, 3) if b else 0.0

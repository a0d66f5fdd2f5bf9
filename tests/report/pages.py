"""Reading report.html as a program does: which value stands where, and what stands there without being data."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

UNREAD = {"style", "script", "pre", "title"}  # no text of the page, or the data itself
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "%": 0.01, "s": 1}
UNITS |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}


@dataclass
class Shown:
    """An element that shows a value of the data: its JSON pointer, its exact value (of a number) and its text."""

    pointer: str
    value: str | None
    text: str = ""


@dataclass
class Page(HTMLParser):
    """`shown`: all values; `words`: the text around them; `tags`: [(name, attributes)]."""

    source: str
    shown: list[Shown] = field(default_factory=list)
    words: str = ""
    embedded: str = ""
    raw: str = ""
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: Shown | None = None
        self._unread = ""
        self.feed(self.source)
        self.close()

    @property
    def data(self) -> dict[str, Any]:
        value = json.loads(self.embedded)
        assert isinstance(value, dict)
        return value

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag in UNREAD:
            self._unread = "embedded" if attributes.get("type") == "application/json" else tag
        if pointer := attributes.get("data-json"):
            assert self._open is None, "values do not nest"
            self._open = Shown(pointer, attributes.get("value"))
            self.shown.append(self._open)

    def handle_endtag(self, tag: str) -> None:
        if tag in UNREAD:
            self._unread = ""
        if tag in ("data", "span") and self._open is not None:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._unread == "embedded":
            self.embedded += data
        elif self._unread == "pre":
            self.raw += data
        elif self._unread:
            pass
        elif self._open is not None:
            self._open.text += data
        else:
            self.words += data


def resolve(data: Any, pointer: str) -> Any:
    """What a JSON pointer points at."""
    for step in pointer.split("/")[1:]:
        data = data[int(step)] if isinstance(data, list) else data[step]
    return data


def says(text: str, value: float) -> bool:
    """Whether a formatted number is that value, as exactly as it is written."""
    text = text.replace("\u00a0", " ")
    if text == "under 0.01 %":
        return 0 < value < 1e-4
    found = re.fullmatch(r"(-?[\d,]+(?:\.(\d+))?)(e-?\d+)?(?: (\S+))?", text)
    assert found, text
    if not (found[2] or found[3]) and found[4] in (None, "bytes", "%") and found[1] in ("0", f"{value:,}"):
        return float(found[1].replace(",", "")) == value  # exact
    unit = UNITS[found[4]] if found[4] else 1
    last = 10.0 ** -len(found[2] or "") * float(f"1{found[3] or ''}")  # worth of the last digit
    if found[4] in ("million", "billion", "trillion", "%") or (found[2] and not found[3] and not found[4]):
        last = max(last, 10.0 ** (len(found[1].split(".")[0].lstrip("-")) - 3))
    return abs(float(found[1].replace(",", "") + (found[3] or "")) * unit - value) <= 0.5001 * last * unit

"""Reading the documentation as a reader does: its fenced and indented blocks, commands and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

COMMAND = re.compile(r"msconv\s+[a-z]")
ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "artifacts" / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A block of code.  `language`: "" for an indented one.  `before`: the paragraph above it."""

    language: str
    text: str
    before: str


def blocks(text: str) -> list[Block]:
    """Fenced and indented blocks, in order."""
    found: list[Block] = []
    before, paragraph = "", ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("```"):
            inside: list[str] = []
            for inner in lines:
                if inner.startswith("```"):
                    break
                inside.append(inner)
            found.append(Block(line[3:].strip(), "\n".join(inside) + "\n", paragraph or before))
            before, paragraph = "", ""
        elif line.startswith("    ") and not paragraph:
            if found and not found[-1].language and not before:
                found[-1] = Block("", found[-1].text + line[4:] + "\n", found[-1].before)
            else:
                found.append(Block("", line[4:] + "\n", before))
            before = ""
        elif line.strip():
            paragraph += line.strip() + " "
        elif paragraph:
            before, paragraph = paragraph.strip(), ""
    return found


def commands(text: str) -> list[str]:
    """Lines that are `msconv ...` in the blocks of a page, continued lines joined."""
    lines = [line.strip() for block in blocks(text) for line in block.text.replace("\\\n", " ").splitlines()]
    plain = [re.sub(r"^(\$ )?(\.venv/bin/)?(?=msconv )", "", line) for line in lines]
    return [line for line in plain if COMMAND.match(line)]


def headings(text: str) -> list[int]:
    """The levels of a page's headings, in order."""
    return [len(h) for h in re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)]


def mentions(text: str) -> list[str]:
    """Commands in the middle of a sentence, but for those with brackets and choices."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    return [span for span in spans if COMMAND.match(span) and not re.search(r"[\[|<…]|\bMODEL\b", span)]


def links(text: str) -> list[str]:
    """Targets of a page's links that are no URLs."""
    bare = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return [t for t in re.findall(r"\]\(([^)\s]+)\)", bare) if not re.match(r"[a-z]+:", t)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}

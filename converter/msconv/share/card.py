"""The card of an artifact on a hub: README.md, filled in from the manifest."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from msconv_runtime.artifact import Manifest
from msconv_runtime.targets import device_of

from ..standing import standings
from .parts import weight_bytes

MARK = "<!-- Written by `msconv push`. Without this line it will not be written anew. -->"
HERE = Path(__file__).parent
ON_A_HUB = re.compile(r"[\w][\w.-]*/[\w.-]+", re.ASCII)


def card(repository: str, revision: str, manifest: Manifest) -> str:
    """The same manifest gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown: what came from outside is made plain by `plain`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    targets = list(dict.fromkeys(g.target for g in manifest.graphs))
    name = repository.rpartition("/")[2]
    source = manifest.model.source
    return environment.get_template("card.md.j2").render(
        mark=MARK,
        title=name,
        reference=f"{repository}@{revision}" if revision else repository,
        artifact=f"artifacts/{name}",
        base_model=source if ON_A_HUB.fullmatch(source) else "",
        m=manifest,
        tp=manifest.parallel.tp,
        ep=manifest.parallel.ep,
        weight_bytes=weight_bytes(manifest),
        targets={t: (manifest.graphs_for(t), manifest.proof_for(t)) for t in targets},
        devices=[t for t in targets if not device_of(t).has_run],
        standings=standings(manifest),
    )


def plain(text: str) -> str:
    """A string that came from outside, on one line, as text and not as markup."""
    return re.sub(r"([\\`*_<>|\[\]&#])", r"\\\1", " ".join(text.split()))

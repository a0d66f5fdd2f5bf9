"""What --model may be: a directory, or owner/name[@revision] on a hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msconv_runtime.artifact import Artifact

from ..families import DecoderConfig, configure
from . import directory
from .directory import Checkpoint
from .headers import parse_json

if TYPE_CHECKING:
    from .hub import Repository  # imported when there is one: the hub's client takes a while

Hub = Literal["huggingface", "modelscope"]
HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,99}/[\w.-]{1,100})(?:@([\w][\w./-]{0,199}))?", re.ASCII)


def open_reference(ref: str, hub: Hub = "huggingface", weights: bool = True) -> Path | Repository:
    """A directory, if there is one of this name, else the repository owner/name[@revision] as its commit is now.

    `weights`: they will be needed (ModelScope's client brings them at once).
    Raises MsconvError; a string that can be neither is taken for a directory.
    """
    path = Path(ref)
    match = REPOSITORY.fullmatch(ref)
    if match is None or _exists(path):
        return path
    name, revision = match[1], match[2] or ""
    if hub == "modelscope":
        from .modelscope import download

        return download(name, revision, weights)
    from .hub import open_repository

    return open_repository(name, revision)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return True


def open_configuration(model: Path | Repository, harmless: Iterable[str] = ()) -> Checkpoint:
    """Only config.json: enough to plan and to compile.  `harmless`: keys of it that change nothing, on no list."""
    if isinstance(model, Path):
        return directory.open_configuration(model, harmless)
    from . import hub

    return hub.open_configuration(model, harmless)


def configuration(artifact: Artifact) -> DecoderConfig:
    """The model's configuration, from the artifact's own config.json.  Raises ArtifactError if it changed."""
    where = str(artifact.root / "config.json")
    raw = parse_json(artifact.config_bytes(), where)
    assert isinstance(raw, dict)
    return configure(raw, where, artifact.manifest.model.harmless)[1]


def bring(model: Path | Repository) -> Path:
    """The whole checkpoint as a directory: downloaded, if it is not."""
    if isinstance(model, Path):
        return model
    from . import hub
    from .downloads import Downloads

    model.download_small((*directory.AUXILIARY, *hub.CONFIGURATION))
    names = hub.shards(model)
    downloads = Downloads(model)
    try:
        downloads.expect(names, lambda n: None)
        for name in names:
            downloads.wait(name)
    finally:
        downloads.stop()
    return model.root

"""Configurations of the recipes' models as they are published, without what changes no size: enough to plan with
where no hub can be reached.  No artifact is made of them."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.hubs import REPOSITORY

HERE = Path(__file__).parent


def published(reference: str) -> Path | None:
    """The directory with the config.json of owner/name[@revision], None if it is not one of these."""
    match = REPOSITORY.fullmatch(reference)
    known = {f"{path.parent.name}/{path.name}": path for path in HERE.glob("*/*") if path.is_dir()}
    return known.get(match[1]) if match else None

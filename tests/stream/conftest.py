"""Checkpoints of models with experts, and their artifacts, made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conversions import convert
from tests.stream.moe_models import KINDS, Artifacts, Models


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Bytes may stay in the page cache: what power cuts do is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda fd: None)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """`model("deepseek FP8")`: its checkpoint, made once.  To be read, never changed."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def make(kind: str) -> Path:
        maker = KINDS[kind][0]
        directory = root / maker.__name__ / "model"
        return directory if directory.exists() else maker(directory)

    return make


@pytest.fixture(scope="session")
def artifact(model: Models, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """`artifact("deepseek FP8", tp, ep)`: converted directly, once.  To be read, never changed."""
    root = tmp_path_factory.mktemp("artifacts")

    @cache
    def make(kind: str, tp: int, ep: int) -> Path:
        out = root / f"{list(KINDS).index(kind)}-{tp}-{ep}"
        convert(model(kind), out, tp, ep=ep, dtype=KINDS[kind][1])
        return out

    return make


@pytest.fixture
def own_artifact(artifact: Artifacts, tmp_path: Path) -> Artifacts:
    """The same, copied: the test may change it."""

    def copy(kind: str, tp: int, ep: int) -> Path:
        return Path(shutil.copytree(artifact(kind, tp, ep), tmp_path / f"own-{tp}-{ep}"))

    return copy

"""docs/adding-an-engine.md, followed to the letter in a copy of the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_page_adds_an_engine_that_serves(tmp_path: Path) -> None:
    written, edited, ran = follow(ROOT / "docs" / "adding-an-engine.md", tmp_path)
    assert {Path(name).parent.as_posix() for name in written} == {"runtime/msconv_runtime/small"}
    assert edited == []
    assert ran[-1] == "MSCONV_ENGINE=small python ask.py"


def test_the_engine_on_the_page_is_not_one_already() -> None:
    assert not (ROOT / "runtime/msconv_runtime/small").exists()

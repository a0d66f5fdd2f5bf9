"""docs/adding-a-model.md, followed to the letter in a copy of the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_page_adds_a_family_that_is_proven(tmp_path: Path) -> None:
    written, edited, ran = follow(ROOT / "docs" / "adding-a-model.md", tmp_path)
    assert written == ["converter/msconv/families/dots1.py"] and edited == []
    assert sum(line.startswith("msconv verify") for line in ran) == 2
    assert ran[-1] == "python generate.py"


def test_the_family_on_the_page_is_not_one_already() -> None:
    """The page shows what is missing; once the family is there for good, it must take another."""
    assert not (ROOT / "converter/msconv/families/dots1.py").exists()

"""docs/adding-a-draft.md, followed to the letter in a copy of the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from msconv_runtime.draft_kinds import DRAFT_KINDS
from tests.docs.following import follow
from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_page_adds_a_kind_that_is_proved_and_drafts_for_a_target(tmp_path: Path) -> None:
    written, edited, ran = follow(ROOT / "docs" / "adding-a-draft.md", tmp_path)
    assert written == [
        "runtime/msconv_runtime/draft_kinds/hop.py",
        "converter/msconv/families/hop.py",
        "converter/msconv/graph/hop.py",
        "converter/msconv/verify/hop.py",
    ]
    assert edited == []
    assert ran[-1] == "python hop.py"


def test_the_kind_on_the_page_is_not_one_already() -> None:
    assert "hop" not in DRAFT_KINDS

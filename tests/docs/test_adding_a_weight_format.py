"""docs/adding-a-weight-format.md, followed to the letter in a copy of the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "adding-a-weight-format.md"


@pytest.mark.slow
def test_the_page_adds_a_weight_format_that_is_kept_and_proven(tmp_path: Path) -> None:
    written, edited, ran = follow(PAGE, tmp_path)
    assert (written, edited) == (["converter/msconv/quant/int8_rows.py"], [])
    assert sum(line.startswith("msconv verify") for line in ran) == 2
    assert "python look.py" in ran and ran[-1] == "python generate.py"


def test_the_format_on_the_page_is_not_one_already() -> None:
    assert not (ROOT / "converter/msconv/quant/int8_rows.py").exists()

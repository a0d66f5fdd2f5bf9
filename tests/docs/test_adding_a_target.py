"""docs/adding-a-target.md, followed to the letter in a copy of the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_page_adds_a_target_that_is_compiled_proven_and_run(tmp_path: Path) -> None:
    written, edited, ran = follow(ROOT / "docs" / "adding-a-target.md", tmp_path)
    assert written == ["runtime/msconv_runtime/targets/bench.py"] and edited == []
    assert sum(line.startswith("msconv verify") and "--target bench" in line for line in ran) == 2
    assert ran[-1] == "python generate.py"


def test_the_target_on_the_page_is_not_one_already() -> None:
    assert not (ROOT / "runtime/msconv_runtime/targets/bench.py").exists()

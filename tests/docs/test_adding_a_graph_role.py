"""docs/adding-a-graph-role.md, followed to the letter in a copy of the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_page_adds_a_role_that_the_runtime_and_the_interpreter_run(tmp_path: Path) -> None:
    written, edited, ran = follow(ROOT / "docs" / "adding-a-graph-role.md", tmp_path)
    assert written == ["runtime/msconv_runtime/roles/embed.py"]
    assert edited == ["runtime/msconv_runtime/targets/cpu.py"]
    assert ran[-1] == "python embed.py"


def test_the_role_on_the_page_is_not_one_already() -> None:
    assert not (ROOT / "runtime/msconv_runtime/roles/embed.py").exists()

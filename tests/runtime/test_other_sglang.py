"""The plug-in beside an SGLang that it was not made for."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest

from msconv_runtime.sglang import plugin
from msconv_runtime.sglang.changes import after

PACKAGE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


@pytest.fixture(autouse=True)
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SGLang of version 0.0.1 without a single part."""
    sglang: Any = ModuleType("sglang")
    sglang.__version__ = "0.0.1"
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    monkeypatch.setitem(sys.modules, "sglang.srt", ModuleType("sglang.srt"))
    monkeypatch.setenv(PACKAGE, "")
    monkeypatch.delenv(PACKAGE)


def test_where_parts_are_missing_nothing_is_changed_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plugin.activate()
    assert PACKAGE not in os.environ
    (record,) = caplog.records
    assert "SGLang 0.0.1 has no sglang.srt." in record.getMessage()
    assert f"lacks {len(plugin.CHANGES) - 1} more" in record.getMessage()
    assert "tried with 0.5.23" in record.getMessage()
    assert "The reason: No module named 'sglang.srt.arg_groups'" in record.getMessage()


def test_another_version_that_has_all_parts_is_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    part: Any = ModuleType("sglang.srt.part")
    part.function = lambda x: x
    monkeypatch.setitem(sys.modules, part.__name__, part)
    monkeypatch.setattr(plugin, "CHANGES", [after("sglang.srt.part.function", lambda result, x: result + 1)])
    plugin.activate()
    assert part.function(1) == 2
    assert os.environ[PACKAGE] == plugin.PACKAGE
    assert caplog.records == []


def test_places_are_named_once() -> None:
    places = [change.place for change in plugin.CHANGES]
    assert len(places) == len(set(places)) > 20

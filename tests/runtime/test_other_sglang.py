"""The plug-in beside an SGLang that it was not made for."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from msconv_runtime.sglang import plugin

KIND = SimpleNamespace(AROUND="around", BEFORE="before", AFTER="after")
PACKAGE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An SGLang of version 0.0.1 without a single part; the places that are registered with it."""
    places: list[str] = []
    registry: Any = ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookType = KIND
    registry.HookRegistry = SimpleNamespace(register=lambda place, *_: places.append(place))
    sglang: Any = ModuleType("sglang")
    sglang.__version__ = "0.0.1"
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    for name in ("sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.setenv(PACKAGE, "")
    monkeypatch.delenv(PACKAGE)
    return places


def test_where_a_part_is_missing_nothing_is_changed_and_that_is_said_once(
    registered: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.activate()
    assert registered == []
    assert PACKAGE not in os.environ
    (record,) = caplog.records
    assert "SGLang 0.0.1 has no sglang.srt." in record.getMessage()
    assert "tried with 0.5.23" in record.getMessage()


def test_another_version_that_has_all_parts_is_taken(
    registered: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_is_there", lambda place: True)
    plugin.activate()
    assert len(registered) > 20
    assert caplog.records == []


def test_a_place_is_there_or_not() -> None:
    assert plugin._is_there("os.path.join")
    assert not plugin._is_there("os.path.no_such")
    assert not plugin._is_there("no_such_package.function")

"""Changes to functions and methods of another package: all of them or none, and everywhere they are known."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from msconv_runtime.sglang.changes import after, before, instead, make

SOURCE = """
def double(x):
    return 2 * x

class Box:
    def __init__(self, x):
        self.x = x

    def more(self, by=1):
        return self.x + by
"""


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module with a function and a class, and one that has imported the function by two names."""
    module = ModuleType("changed_package")
    exec(SOURCE, vars(module))
    user: Any = ModuleType("user_of_changed_package")
    user.double = user.twice = vars(module)["double"]
    user.other = max
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, user.__name__, user)
    module.user = user
    yield module


def test_a_function_is_changed_wherever_it_was_imported(package: Any) -> None:
    assert make([after("changed_package.double", lambda result, x: result + 1)]) == {}
    assert [package.double(3), package.user.double(3), package.user.twice(3)] == [7, 7, 7]
    assert package.user.other is max
    assert package.double.__name__ == "double"


def test_what_looks_at_arguments_or_results_may_leave_them(package: Any) -> None:
    seen: list[Any] = []
    make([before("changed_package.double", seen.append), after("changed_package.Box.more", lambda *_, **__: None)])
    assert package.double(3) == 6
    assert seen == [3]
    assert package.Box(3).more(by=2) == 5


def test_arguments_are_replaced_before_and_results_even_by_zero_after(package: Any) -> None:
    make(
        [
            before("changed_package.double", lambda x: ((x + 1,), {})),
            after("changed_package.Box.more", lambda result, box, by=1: 0),
        ]
    )
    assert package.double(3) == 8
    assert package.Box(3).more() == 0


def test_a_method_or_a_constructor_gets_the_original(package: Any) -> None:
    def more(original: Any, box: Any, by: int = 1) -> Any:
        return 10 * original(box, by=by)

    def init(original: Any, box: Any, x: int) -> None:
        original(box, x + 1)

    make([instead("changed_package.Box.more", more), instead("changed_package.Box.__init__", init)])
    assert package.Box(3).more(by=2) == 60


def test_two_changes_of_one_function_are_both_made_the_later_outside(package: Any) -> None:
    make(
        [
            after("changed_package.double", lambda result, x: result + 1),
            after("changed_package.double", lambda result, x: result * 10),
        ]
    )
    assert [package.double(3), package.user.twice(3)] == [70, 70]


def test_what_a_place_needs_and_is_missing_is_the_reason(package: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\ndef function():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    changes = [after("needs_more.function", lambda result: 0), after("needs_more.Class.method", lambda result: 0)]
    assert set(make(changes).values()) == {"No module named 'no_such_dependency'"}


@pytest.mark.parametrize(
    "place",
    ["changed_package.none", "changed_package.None_.more", "changed_package.Box.none", "no_package.double"],
)
def test_where_one_place_is_missing_nothing_is_changed(package: Any, place: str) -> None:
    original = package.double
    changes = [after("changed_package.double", lambda result, x: 0), after(place, lambda result: 0)]
    (lacking, reason), *rest = make(changes).items()
    assert lacking == place and reason and not rest
    assert package.double is package.user.twice is original


@pytest.mark.parametrize("enabled", [True, False])
def test_searches_for_garbage_are_as_before(package: Any, enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        make([after("changed_package.double", lambda result, x: 0)])
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()

"""docs/roofline.md says what the recipes, the figures and the graphs are now."""

from __future__ import annotations

import pytest

from docs.rooflines import FIGURES, PAGE, figures_rows, found, published_row, recipe_row, recipes
from tests.roofline.counting import every_layout

WRITE = "docs/roofline.md is out of date: python -m docs.rooflines"
BY_NAME = {recipe.name: recipe for recipe in recipes()}
SOME = ("Qwen3-0.6B-310p", "Qwen3-30B-A3B-w8a8")


def line(row: tuple[str, ...]) -> str:
    return "| " + " | ".join(row) + " |"


def test_every_device_and_every_recipe_has_its_row() -> None:
    page = PAGE.read_text()
    assert [line(row) for row in figures_rows()] == found(page, "figures").splitlines()[2:], WRITE
    rows = found(page, "recipes").splitlines()[2:]
    assert [row.split("]")[0].removeprefix("| [") for row in rows] == list(BY_NAME), WRITE
    assert len(found(page, "published").splitlines()[2:]) == len(FIGURES), WRITE


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOME, *(pytest.param(n, marks=every_layout) for n in BY_NAME if n not in SOME)])
def test_a_recipe_s_row_is_what_its_graphs_give(name: str) -> None:
    assert line(recipe_row(BY_NAME[name])) in found(PAGE.read_text(), "recipes").splitlines(), WRITE


@every_layout
@pytest.mark.parametrize("number", range(len(FIGURES)))
def test_a_published_figure_stands_beside_its_bound(number: int) -> None:
    said = FIGURES[number]
    assert line(published_row(said, BY_NAME[said.recipe])) in found(PAGE.read_text(), "published").splitlines(), (
        WRITE
    )

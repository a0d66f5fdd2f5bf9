"""Versions of other packages that this code was tried with, and what belongs to a series of versions."""

from __future__ import annotations

import re

MINDSPORE = ("2.8", "2.10")  # graphs of 2.8.0 and 2.10.0 load in each other
ONNX = ("1.23",)
TRIED = {"mindspore": MINDSPORE, "onnx": ONNX}  # by the package that writes graphs


def in_series(version: str, series: tuple[str, ...]) -> bool:
    """Whether a version is of one of the series: 2.8.0 and 2.8.0+cpu are of 2.8, 2.80 is not."""
    return any(re.match(re.escape(s) + r"(?!\d)", version) for s in series)


def named(series: tuple[str, ...], between: str) -> str:
    """`2.8.x or 2.10.x`; a full version stays as it is."""
    return between.join(s if s.count(".") > 1 else f"{s}.x" for s in series)

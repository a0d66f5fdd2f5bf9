"""Plain matrices: values in bfloat16, float16 or float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from msconv_runtime.dtypes import VALUE_DTYPES

from .record import MATRIX, Header, Stored, WeightFormat


@dataclass(frozen=True, slots=True)
class Plain(WeightFormat):
    name = ""
    title = "plain"
    method = ""
    element = ""

    @classmethod
    def read(cls, config: Mapping[str, object], problems: list[str]) -> Self | None:
        return None  # what is not quantised is not described either

    def claims(self, matrix: str, headers: Mapping[str, Header]) -> bool:
        return headers[matrix].dtype in VALUE_DTYPES

    @property
    def sources(self) -> tuple[Stored, ...]:
        return (MATRIX,)

    def reference(self, matrix: str, read: Callable[[str], Any], rounds: Callable[[Any], Any]) -> Any:
        return rounds(read(matrix))


PLAIN = Plain()

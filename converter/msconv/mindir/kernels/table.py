"""The table of kernels and what they may know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """Hears the codes of activations: see msconv.mindir.codes, which has one."""

    def begin(self) -> None:
        """A graph is called."""

    def saw(self, rank: int, matrix: str, codes: torch.Tensor, ids: torch.Tensor | None) -> None:
        """Codes of the input of the matrix of this name: [T, K], or experts' [T, k, K] with `ids` [T, k]."""


@dataclass(frozen=True)
class Context:
    """`exact`: compute and keep float32 where the graph says bfloat16 or float16.  `dtype`: the graph's.  `codes`:
    who hears the codes of int8 products."""

    exact: bool
    dtype: torch.dtype
    codes: Recorder | None = None

    def keep(self, dtype: torch.dtype) -> torch.dtype:
        """The type a value of `dtype` has in this mode."""
        return torch.float32 if self.exact and dtype in (torch.bfloat16, torch.float16) else dtype


@dataclass(frozen=True)
class Kernel:
    """`run(context, attributes, *inputs)`.  `attributes`: the names it obeys; others are an error.
    `codes(*inputs)`, for kernels that make codes within: [(which input is the matrix, codes, ids or None)]."""

    run: Callable[..., Any]
    attributes: frozenset[str]
    codes: Callable[..., Any] | None = None


KERNELS: dict[str, Kernel] = {}


def kernel(
    *names: str, attributes: tuple[str, ...] = (), codes: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for primitives of these names."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            KERNELS[name] = Kernel(run, frozenset(attributes), codes)
        return run

    return register


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Half types are computed in float32 and rounded once, as accelerators accumulate."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

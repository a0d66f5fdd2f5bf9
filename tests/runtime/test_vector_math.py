"""The first call of each of torch's elementwise functions takes one element: two threads that made it might take
code of low accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msconv.verify.lockstep import Lockstep
from msconv.verify.reference import Reference
from msconv_runtime.artifact import Artifact
from msconv_runtime.vector_math import FUNCTIONS, choose_code
from tests.conftest import Checkpoints

IN_MKL = {"exp", "sin", "cos", "sqrt", "log", "tanh", "erf"}  # what a proof is known to hand to it, or may one day


class FirstCalls(TorchDispatchMode):
    """Elements that each operation took when it was first called."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        taken = [a.numel() for a in args if isinstance(a, torch.Tensor)]
        self.elements.setdefault(name, max(taken, default=0))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unchosen() -> Iterator[None]:
    """As a fresh process is."""
    choose_code.cache_clear()
    yield
    choose_code.cache_clear()


def test_a_reference_chooses_before_it_computes(checkpoint: Checkpoints, compiled: Path, unchosen: None) -> None:
    with FirstCalls() as first:
        Reference(checkpoint("untied"), Artifact(compiled).manifest).traces([[1, 2, 3]])
    check(first)


def test_the_interpreter_chooses_before_it_computes(compiled: Path, unchosen: None) -> None:
    with FirstCalls() as first:
        Lockstep(Artifact(compiled), "cpu").prefill([[1, 2, 3]])
    check(first)


def check(first: FirstCalls) -> None:
    assert {"cos", "sin"} <= first.elements.keys()
    assert {name: n for name, n in first.elements.items() if name in IN_MKL and n > 1} == {}


def test_that_is_once_a_process(unchosen: None) -> None:
    with FirstCalls() as first:
        choose_code()
    assert set(FUNCTIONS) <= {name.removeprefix("special_") for name in first.elements}
    with FirstCalls() as second:
        choose_code()
    assert second.elements == {}

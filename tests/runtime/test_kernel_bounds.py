"""Compiled kernels check what a graph gives them: another shape or type is an error, never a read past an end."""

from __future__ import annotations

import numpy as np
import pytest

from msconv_runtime.kernels import library
from msconv_runtime.kernels.check import call, examples

EXAMPLES = examples(np.random.default_rng(0))
PATH = library().path
pytestmark = pytest.mark.skipif(PATH is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_input_of_another_shape_or_type_is_refused(name: str) -> None:
    assert PATH is not None
    inputs, outputs = EXAMPLES[name]
    function, shapes = name.partition(" ")[0], [o.shape for o in outputs]
    for i, given in enumerate(inputs):
        other = np.int32 if given.dtype != np.int32 else np.float32
        for wrong in (given[..., :-1], given[None], given.reshape(-1)[:0], given.astype(other)):
            with pytest.raises(ArithmeticError, match=f"{function} returned [24]"):
                call(PATH, function, [*inputs[:i], wrong, *inputs[i + 1 :]], *shapes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_output_of_another_shape_is_refused(name: str) -> None:
    assert PATH is not None
    inputs, outputs = EXAMPLES[name]
    function, shapes = name.partition(" ")[0], [o.shape for o in outputs]
    for i, shape in enumerate(shapes):
        for wrong in ((*shape[:-1], shape[-1] + 1), (*shape, 1), (shape[0] + 1, *shape[1:])):
            with pytest.raises(ArithmeticError, match=f"{function} returned [24]"):
                call(PATH, function, inputs, *shapes[:i], wrong, *shapes[i + 1 :])


def test_indices_past_the_end_are_refused() -> None:
    assert PATH is not None
    table, ids = EXAMPLES["Rows"][0]
    for bad in (-1, len(table), 2**31 - 1, -(2**31)):
        wrong = ids.copy()
        wrong[-1] = bad
        with pytest.raises(ArithmeticError, match="Rows returned 2"):
            call(PATH, "Rows", [table, wrong], (len(ids), table.shape[1]))

"""The interpreter's kernels of int8, against whole numbers in NumPy and hand-made cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from msconv.mindir.kernels.int8 import row_codes, sums
from tests.verify.kernel_calls import EXACT, EXACT_HALF, ROUNDED, call, ints, random

INT8, BFLOAT16, FLOAT16 = 32, 45, 42  # MindSpore's numbers
EACH = (1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0)


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8))


def whole(x: torch.Tensor, weight: torch.Tensor) -> Any:
    return x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64)


def test_a_row_has_the_scale_of_its_largest_value() -> None:
    x = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0], [127.0, 0.5, 1.5]])
    found, scales = call("DynamicQuantExt", x, None)
    assert scales.tolist() == [np.float32(2) / np.float32(127), 0.0, 1.0]
    assert found.tolist() == [[32, -127, 64], [0, 0, 0], [127, 0, 2]]  # half to even
    assert found.dtype == torch.int8


def test_codes_of_bfloat16_are_those_of_the_values() -> None:
    x = random(7, 33).bfloat16()
    assert torch.equal(call("DynamicQuantExt", x, None, context=ROUNDED)[0], row_codes(x.float())[0])


def test_a_static_input_is_clamped() -> None:
    x = torch.tensor([[-1000.0, 1000.0, 0.25, 0.75, -0.25]])
    found = call("QuantV2", x, torch.tensor([2.0]), torch.tensor([3.0]), False, 0, INT8)
    assert found.tolist() == [[-128, 127, 4, 4, 2]]


@pytest.mark.parametrize("settings", [(True, 0, INT8), (False, 1, INT8), (False, 0, 34)])
def test_other_kinds_of_rounding_are_refused(settings: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="not known"):
        call("QuantV2", torch.ones(1, 2), torch.ones(1), torch.zeros(1), *settings)


def test_sums_of_the_longest_rows_are_exact() -> None:
    x, weight = codes(2, 133_000), codes(133_000, 3, seed=1)
    x[0], weight[:, 0] = -128, -128
    x[1], weight[:, 1] = 127, -128
    assert np.array_equal(sums(x, weight).numpy(), whole(x, weight))
    with pytest.raises(TypeError, match="not of int8 by int8"):
        sums(x, weight.float())


def product(x: Any, weight: Any, scale: Any, bias: Any, token: Any, dtype: int, context: Any = EXACT) -> Any:
    return call("QuantBatchMatmul", x, weight, scale, None, bias, token, False, True, dtype, context=context)


def test_a_product_with_a_scale_a_token() -> None:
    x, weight, scale, token = codes(5, 300), codes(4, 300, seed=1), random(4).abs(), random(5, seed=2).abs()
    wanted = whole(x, weight.T).astype(np.float32) * scale.numpy() * token.numpy()[:, None]
    assert np.array_equal(product(x, weight, scale, None, token, BFLOAT16).numpy(), wanted)
    rounded = product(x, weight, scale, None, token, BFLOAT16, ROUNDED)
    assert torch.equal(rounded, torch.from_numpy(wanted).bfloat16())


def test_a_product_with_a_bias() -> None:
    x, weight, scale, bias = codes(5, 300), codes(4, 300, seed=1), random(4).abs(), ints(5, -7, 2**24 + 1, 0)
    wanted = (whole(x, weight.T) + bias.numpy()).astype(np.float32) * scale.numpy()
    assert np.array_equal(product(x, weight, scale, bias, None, BFLOAT16).numpy(), wanted)
    bits = scale.view(torch.int32).long()
    half = product(x, weight, bits, bias, None, FLOAT16, EXACT_HALF)
    assert np.array_equal(half.numpy(), wanted)
    with pytest.raises(ValueError, match="no bits of float32"):
        product(x, weight, bits + 2**40, bias, None, FLOAT16, EXACT_HALF)
    with pytest.raises(TypeError, match="scales"):
        product(x, weight, scale[:3], bias, None, BFLOAT16)
    with pytest.raises(TypeError, match="bias"):
        product(x, weight, scale, bias.float(), None, BFLOAT16)


def grouped(x: Any, weight: Any, scale: Any, token: Any, groups: Any, context: Any = EXACT, **changes: Any) -> Any:
    given = [
        [x],
        [weight],
        None,
        [scale],
        None,
        None,
        None,
        [token],
        groups,
        None,
        None,
        None,
        3,
        0,
        1,
        0,
        BFLOAT16,
    ]
    for place, value in changes.items():
        given[int(place[1:])] = value
    return call("GroupedMatmulV4", *given, context=context, group_info=EACH)[0]


def test_grouped_products_take_each_groups_scales() -> None:
    x, weight, scale, token = codes(7, 40), codes(3, 40, 6, seed=1), random(3, 6).abs(), random(7, seed=3).abs()
    found = grouped(x, weight, scale, token, ints(2, 0, 3))
    for row, expert in enumerate((0, 0, 2, 2, 2)):
        total = whole(x[row : row + 1], weight[expert]).astype(np.float32)[0]
        assert np.array_equal(found[row].numpy(), total * scale[expert].numpy() * token[row].numpy())
    assert bool(found[5:].isnan().all())


def test_grouped_products_have_the_type_of_their_scales() -> None:
    x, weight, scale, token = codes(2, 8), codes(1, 8, 4), random(1, 4).abs(), random(2).abs()
    assert grouped(x, weight, scale.bfloat16(), token, ints(2), ROUNDED).dtype == torch.bfloat16
    assert grouped(x, weight, scale, token, ints(2), ROUNDED).dtype == torch.float16


@pytest.mark.parametrize("change", [{"_7": None}, {"_2": [torch.ones(4)]}, {"_15": 1}, {"_16": None}])
def test_other_grouped_products_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="GroupedMatmulV4"):
        grouped(codes(2, 8), codes(1, 8, 4), torch.ones(1, 4), torch.ones(2), ints(2), **change)

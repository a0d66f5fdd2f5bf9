"""Int8 graphs of MindSpore's own CPU operations, run by MindSpore: the interpreter's codes and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msconv.mindir.kernels.int8 import dynamic_product, input_codes, row_codes, sums
from msconv_runtime.binding import tensor
from tests.verify.int8_runs import Model, Run

pytestmark = pytest.mark.slow

INNER = 2500  # three pieces of the emulation
BOUND = 1e-4
FLIPPED = 0.5  # what a code that float32 rounded the other way may do to logits of a sequence


def numbers(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def codes(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8)


@pytest.fixture(scope="module")
def run() -> Any:
    """A cell's result, compiled as a graph."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    return lambda cell, *inputs: cell(*(ms.Tensor.from_numpy(np.ascontiguousarray(i)) for i in inputs)).asnumpy()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("inner", [48, 1024, INNER])
def test_a_dynamic_product_bit_for_bit(run: Any, rows: int, inner: int) -> None:
    from mindspore import ops

    from msconv.graph.cpu.int8 import DynamicProduct
    from msconv.graph.cpu.plain import ProductOfFewRows

    x, weight, scale = numbers(1, rows, inner), codes(2, 31, inner), np.abs(numbers(3, 31, 1))
    x[0] = x[0] if rows == 1 else 0
    wanted = dynamic_product(*(torch.from_numpy(a) for a in (x, weight.T, scale[:, 0])))
    for product in (ops.MatMul(transpose_b=True), ProductOfFewRows()):
        found = run(DynamicProduct(product), x, weight, scale)
        assert np.array_equal(found, wanted.numpy())


@pytest.mark.parametrize("inner", [48, INNER])
def test_a_static_product_bit_for_bit(run: Any, inner: int) -> None:
    from mindspore import ops

    from msconv.graph.cpu.int8 import StaticProduct

    x, weight, deq = numbers(1, 9, inner), codes(2, 31, inner), np.abs(numbers(3, 31))
    bias = np.random.default_rng(4).integers(-9999, 9999, 31, dtype=np.int32)
    scale, offset = np.array([0.0171], np.float32), np.array([-7.0], np.float32)
    found = run(StaticProduct(ops.MatMul(transpose_b=True)), x, weight, deq, bias, scale, offset)
    given = input_codes(*(torch.from_numpy(a) for a in (x, 1 / scale, offset)))
    assert int(given.min()) == -128  # some are clamped
    wanted = (sums(given, torch.from_numpy(weight.T)) + torch.from_numpy(bias)).float() * torch.from_numpy(deq)
    assert np.array_equal(found, wanted.numpy())


def test_products_of_experts_bit_for_bit(run: Any) -> None:
    from msconv.graph.cpu.int8 import DynamicProductOfAll, DynamicProductOfChosen

    weight, scale = codes(2, 4, INNER, 6), np.abs(numbers(3, 4, 1, 6))
    x, ids = numbers(1, 5, 1, INNER), np.array([3, 0, 0, 2, 3], np.int32)

    def wanted(rows: Any, expert: int) -> Any:
        given = (rows, weight[expert], scale[expert, 0])
        return dynamic_product(*(torch.from_numpy(a) for a in given)).numpy()

    found = run(DynamicProductOfChosen(), x, ids, weight, scale)
    assert all(np.array_equal(found[i], wanted(x[i], e)) for i, e in enumerate(ids))
    x = numbers(5, 4, 3, INNER)
    found = run(DynamicProductOfAll(), x, ids, weight, scale)
    assert all(np.array_equal(found[e], wanted(x[e], e)) for e in range(4))


def test_ties_go_to_the_even_code(run: Any) -> None:
    from mindspore import ops

    from msconv.graph.cpu.int8 import DynamicProduct

    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
    identity = np.eye(7, dtype=np.int8)
    found = run(DynamicProduct(ops.MatMul(transpose_b=True)), x, identity, np.ones((7, 1), np.float32))
    assert found.tolist() == [[127, 0, 2, 2, 0, -2, -2]] == row_codes(torch.from_numpy(x))[0].tolist()


class Bound:
    """A graph of a `Run`, loaded by MindSpore with rank 0's weights."""

    def __init__(self, run: Run, role: str, directory: Path) -> None:
        import mindspore as ms
        from mindspore import nn

        path = directory / f"{role}.mindir"
        path.write_bytes(run.exports[role].proto)
        self.cell = nn.GraphCell(ms.load(str(path)))
        for parameter in run.exports[role].parameters:
            array = run.weights[0].get(parameter.name, None).contiguous().numpy()
            assert str(array.dtype) == parameter.dtype, parameter
            self.cell._params[parameter.name].assign_value(tensor(array, parameter.dtype))
        shapes = (ms.Tensor(shape=list(i.shape), dtype=getattr(ms, i.dtype)) for i in run.exports[role].inputs)
        self.cell.set_inputs(*shapes)

    def __call__(self, batch: Any, caches: list[Any]) -> Any:
        return self.cell(*(tensor(np.ascontiguousarray(a), "int32") for a in batch.arrays), *caches).asnumpy()


@pytest.mark.parametrize(
    "model",
    [Model("qwen3 tied", "dynamic", shifted=True), Model("qwen3_moe", "mixed"), Model("deepseek_v3", "mixed")],
    ids=lambda model: model.name,
)
def test_whole_graphs_as_they_are_interpreted(model: Model, tmp_path: Path) -> None:
    run = Run(model, "cpu", {"prefill": "", "decode": ""})
    run.begin(6)
    rng = np.random.default_rng(3)
    steps = [[rng.integers(0, 1000, n).tolist() for n in (5, 2, 7, 1, 4, 3)], [[int(t)] for t in range(6)]]
    wanted = [run.call(role, tokens) for role, tokens in zip(("prefill", "decode"), steps, strict=True)]
    run.begin(6)
    caches = [tensor(np.zeros_like(c.numpy()), "float32") for c in run.caches[0]]
    away = []
    for role, tokens, step in zip(("prefill", "decode"), steps, wanted, strict=True):
        found = Bound(run, role, tmp_path)(run.sequences.advance(tokens), caches)
        away.append(np.abs(found - step.outputs[0][0]).max(-1))
    worst = np.max(away, 0)  # of each sequence
    assert np.median(worst) < BOUND, worst
    assert worst.max() < FLIPPED, worst

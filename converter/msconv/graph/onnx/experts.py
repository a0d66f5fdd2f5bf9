"""Mixture of experts: routing, and the products with the chosen experts' matrices, stacked as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from ...families.config import Moe
from .attention import Layers
from .builder import FLOAT, Builder
from .forms import Plain

LEFT_OUT = -10000.0  # score of an expert whose group was not chosen: scores are sigmoids with a bias


def moe(of: Layers, x: str, prefix: str) -> str:
    """[T, hidden] -> the same: the weighted sum of what the chosen experts and the shared one make of a token."""
    sizes = of.config.moe
    assert sizes is not None
    weights, ids = _route(of, x, prefix + "gate", sizes)
    if not isinstance(of.form, Plain):
        y = _one_by_one(of, x, weights, ids, prefix + "experts.", sizes)
    elif of.form.batch * of.form.new * sizes.top_k <= sizes.experts:
        y = _of_each_token(of, x, weights, ids, prefix + "experts.", sizes)
    else:
        y = _all(of, x, weights, ids, prefix + "experts.", sizes)
    if sizes.shared_ffn:
        y = of.b.op("Add", y, of.mlp(x, prefix + "shared_experts.", sizes.shared_ffn))
    return y


def _route(of: Layers, x: str, name: str, moe: Moe) -> tuple[str, str]:
    """Weights [T, k] and ids [T, k] of the chosen experts."""
    b = of.b
    logits = b.op("Gemm", x, b.values(name + ".weight"), transB=1)
    if moe.scoring == "softmax":
        weights, ids = _best(b, b.op("Softmax", logits, axis=-1), moe.top_k)
    else:
        scores = b.op("Sigmoid", logits)
        choice = b.op("Add", scores, b.values(name + ".e_score_correction_bias"))
        if moe.top_groups < moe.groups:
            choice = _in_best_groups(b, choice, moe)
        _, ids = _best(b, choice, moe.top_k)
        weights = b.op("GatherElements", scores, ids, axis=1)
    if moe.normalise:
        weights = b.op("Div", weights, b.op("ReduceSum", weights, b.whole([-1]), keepdims=1))
    if moe.scale != 1.0:
        weights = b.op("Mul", weights, b.real(moe.scale))
    return weights, ids


def _best(b: Builder, scores: str, count: int) -> list[str]:
    """Values and places of the largest in the last dimension, the largest first."""
    return b.node("TopK", (scores, b.whole([count])), [b.name(), b.name()], axis=-1)


def _in_best_groups(b: Builder, choice: str, moe: Moe) -> str:
    """Scores [T, E] with those of other groups than the best set to LEFT_OUT: a group is as good as the sum of its
    best two."""
    size = moe.experts // moe.groups
    grouped = b.reshape(choice, -1, moe.groups, size)
    two, _ = _best(b, grouped, 2)
    _, chosen = _best(b, b.op("ReduceSum", two, b.whole([-1]), keepdims=0), moe.top_groups)
    kept = b.op("ReduceSum", _marks(b, chosen, moe.groups), b.whole([1]), keepdims=0)
    kept = b.op("Unsqueeze", b.op("Greater", kept, b.real(0.5)), b.whole([2]))
    return b.reshape(b.op("Where", kept, grouped, b.real(LEFT_OUT)), -1, moe.experts)


def _marks(b: Builder, ids: str, count: int) -> str:
    """ids [T, k] -> [T, k, count]: 1 where the id is, else 0."""
    same = b.op("Equal", b.op("Unsqueeze", ids, b.whole([2])), b.whole(np.arange(count)))
    return b.op("Cast", same, to=FLOAT)


def _of_each_token(of: Layers, x: str, weights: str, ids: str, prefix: str, moe: Moe) -> str:
    """The chosen experts' matrices gathered, one set a token: few tokens."""
    b, hidden = of.b, of.config.hidden
    flat = b.reshape(ids, -1)
    repeated = b.op("Expand", b.op("Unsqueeze", x, b.whole([1])), b.whole([1, moe.top_k, 1]))
    rows = b.reshape(repeated, -1, 1, hidden)
    y = of.gated(b.op("MatMul", rows, b.rows(prefix + "gate_up_proj.weight", flat)), moe.ffn)
    y = b.op("MatMul", y, b.rows(prefix + "down_proj.weight", flat))
    weighted = b.op("Mul", b.reshape(y, -1, moe.top_k, hidden), b.op("Unsqueeze", weights, b.whole([2])))
    return b.op("ReduceSum", weighted, b.whole([1]), keepdims=0)


def _all(of: Layers, x: str, weights: str, ids: str, prefix: str, moe: Moe) -> str:
    """All experts compute all tokens, and what was not chosen counts for nothing: sizes do not depend on data."""
    b = of.b
    shares = b.op("Mul", _marks(b, ids, moe.experts), b.op("Unsqueeze", weights, b.whole([2])))
    shares = b.op("ReduceSum", shares, b.whole([1]), keepdims=0)  # [T, E]
    shares = b.op("Unsqueeze", b.op("Transpose", shares, perm=[1, 0]), b.whole([2]))
    y = b.op("MatMul", b.op("Unsqueeze", x, b.whole([0])), b.values(prefix + "gate_up_proj.weight"))
    y = b.op("MatMul", of.gated(y, moe.ffn), b.values(prefix + "down_proj.weight"))
    return b.op("ReduceSum", b.op("Mul", y, shares), b.whole([0]), keepdims=0)


def _one_by_one(of: Layers, x: str, weights: str, ids: str, prefix: str, moe: Moe) -> str:
    """A loop over the experts that any token chose: each gets its tokens, and no other weights are touched."""
    b = of.b
    (present,) = b.node("Unique", (ids,), [b.name()], sorted=1)
    number, going, found = b.name(), b.name(), b.name()
    with b.body() as nodes:
        expert = b.op("Gather", present, number)
        hits = b.op("NonZero", b.op("Equal", ids, expert))  # [2, n]: a token, and which of its k choices it is
        rows = b.op("Gather", hits, b.whole(0), axis=0)
        share = b.op("Unsqueeze", b.op("GatherND", weights, b.op("Transpose", hits, perm=[1, 0])), b.whole([1]))
        y = b.op("MatMul", b.op("Gather", x, rows, axis=0), b.rows(prefix + "gate_up_proj.weight", expert))
        y = b.op("MatMul", of.gated(y, moe.ffn), b.rows(prefix + "down_proj.weight", expert))
        y = b.op("Mul", y, share)
        column = b.op("Unsqueeze", rows, b.whole([1]))
        out = b.op("ScatterND", found, column, y, reduction="add")
        still = b.op("Identity", going)
    body = _loop_body(nodes, (number, going, found), (still, out), of.config.hidden)
    nothing = b.op("Mul", x, b.real(0.0))
    always = b.constant(np.asarray(True))  # onnx.reference takes no condition for a false one
    return b.op("Loop", b.op("Size", present), always, nothing, body=body)


def _loop_body(nodes: list[Any], takes: tuple[str, str, str], gives: tuple[str, str], hidden: int) -> Any:
    number, going, found = takes
    rows = ["rows", hidden]
    inputs = [
        helper.make_tensor_value_info(number, TensorProto.INT64, []),
        helper.make_tensor_value_info(going, TensorProto.BOOL, []),
        helper.make_tensor_value_info(found, TensorProto.FLOAT, rows),
    ]
    outputs = [
        helper.make_tensor_value_info(gives[0], TensorProto.BOOL, []),
        helper.make_tensor_value_info(gives[1], TensorProto.FLOAT, rows),
    ]
    return helper.make_graph(nodes, "experts", inputs, outputs)

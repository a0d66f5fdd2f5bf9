"""Scales and offsets that cannot be right: conversion refuses them by name and number, and `lint` finds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from msconv.steps.lint import lint
from msconv_runtime.errors import CheckpointError
from tests.conversions import convert
from tests.int8_checkpoints import Tensors
from tests.quant.conftest import Int8
from tests.quant.test_refused_int8 import edited, refused

pytestmark = pytest.mark.usefixtures("quick")

LAYER = "model.layers.0."
Q, OUT, UP = LAYER + "self_attn.q_proj", LAYER + "self_attn.o_proj", LAYER + "mlp.up_proj"
EXPERT = LAYER + "mlp.experts.3.up_proj"
IN_BLOCKS = "model.layers.1.mlp.experts.5.up_proj"  # transposed; the other is moved by rows
KV_B = LAYER + "self_attn.kv_b_proj"
NAN, INF = float("nan"), float("inf")
Change = Callable[[Tensors], None]


def put(names: str | Sequence[str], value: float, at: int = 0) -> Change:
    def change(tensors: Tensors) -> None:
        for name in [names] if isinstance(names, str) else names:
            kind: Any = ml_dtypes.bfloat16 if tensors[name].code == "BF16" else np.float32
            tensors[name].bits.reshape(-1).view(kind)[at] = value

    return change


def of_inputs(what: str, value: float) -> Change:
    return put([f"{LAYER}self_attn.{p}_proj.{what}" for p in "qkv"], value)


@pytest.fixture
def own(int8: Int8, source: Int8, tmp_path: Path) -> Int8:
    def make(family: str, form: str) -> Path:
        found = source(family, "FP8") if form == "FP8" else int8(family, form)
        return Path(shutil.copytree(found, tmp_path / "own"))

    return make


def refused_and_found(model: Path, tmp_path: Path, name: str, words: str, **options: Any) -> None:
    error = refused(model, tmp_path, f"{name}: ", words, **options)
    assert isinstance(error, CheckpointError)
    assert [f for f in lint(model).findings if f.severity == "error" and name in f.where]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "row 3 is 0: its codes are not all 0"),
        (-0.25, "row 3 is -0.25: it must not be below 0"),
        (NAN, "row 3 is nan: it has to be a finite number"),
        (INF, "row 3 is inf"),
    ],
)
@pytest.mark.parametrize(
    ("family", "form", "name"),
    [
        ("qwen3", "dynamic", Q + ".weight_scale"),
        ("qwen3", "compressed", Q + ".weight_scale"),
        ("qwen3", "static", OUT + ".deq_scale"),
        ("qwen3", "static", Q + ".deq_scale"),
        ("qwen3_moe", "mixed", EXPERT + ".weight_scale"),
    ],
)
def test_a_rows_scale_that_cannot_be_right_is_refused(
    own: Int8, tmp_path: Path, family: str, form: str, name: str, value: float, words: str
) -> None:
    refused_and_found(edited(own(family, form), put(name, value, at=3)), tmp_path, name, words, tp=2)


def test_a_scale_of_int64_is_looked_at_too(own: Int8, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[Q + ".deq_scale"].bits[5] = np.float32(NAN).view(np.uint32)

    model = edited(own("qwen3", "of float16"), change)
    refused_and_found(model, tmp_path, Q + ".deq_scale", "row 5 is nan")


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("input_scale", 0.0, "the input scale is 0: it has to be above 0"),
        ("input_scale", -0.05, "the input scale is -0.05: it must not be below 0"),
        ("input_scale", NAN, "the input scale is nan"),
        ("input_scale", INF, "the input scale is inf"),
        ("input_offset", 0.5, "the input offset is 0.5: it has to be a whole number from -128 to 127"),
        ("input_offset", 128.0, "the input offset is 128"),
        ("input_offset", -129.0, "the input offset is -129"),
        ("input_offset", NAN, "the input offset is nan"),
        ("input_offset", INF, "the input offset is inf"),
    ],
)
def test_an_inputs_scale_or_offset_that_cannot_be_right_is_refused(
    own: Int8, tmp_path: Path, what: str, value: float, words: str
) -> None:
    """Also of a matrix whose sums are taken with the offset, over each rank's columns."""
    refused_and_found(edited(own("qwen3", "static"), of_inputs(what, value)), tmp_path, f"{Q}.{what}", words)
    for used in ("own", "out"):
        shutil.rmtree(tmp_path / used)
    model = edited(own("qwen3", "static"), put(f"{OUT}.{what}", value))
    refused_and_found(model, tmp_path, f"{OUT}.{what}", words, tp=2)


@pytest.mark.parametrize("quant", [None, "w8a8"])
@pytest.mark.parametrize("module", [IN_BLOCKS, KV_B])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "block [0, 0] is 0: its codes are not all 0"),
        (-1.0, "block [0, 0] is -1"),
        (NAN, "block [0, 0] is nan"),
    ],
)
def test_a_blocks_scale_that_cannot_be_right_is_refused(
    own: Int8, tmp_path: Path, module: str, value: float, words: str, quant: str | None
) -> None:
    name = module + ".weight_scale_inv"
    model = edited(own("deepseek_v3", "FP8"), put(name, value))
    refused_and_found(model, tmp_path, name, words, tp=2, quant=quant)


@pytest.mark.parametrize(
    ("family", "form", "module", "scales"),
    [
        ("qwen3", "dynamic", Q, ".weight_scale"),
        ("qwen3", "static", OUT, ".deq_scale"),
        ("qwen3_moe", "mixed", EXPERT, ".weight_scale"),
        ("deepseek_v3", "FP8", IN_BLOCKS, ".weight_scale_inv"),
    ],
)
def test_codes_of_zero_may_have_a_scale_of_zero(
    own: Int8, tmp_path: Path, family: str, form: str, module: str, scales: str
) -> None:
    """Of FP8 0x80 is zero too."""

    def change(tensors: Tensors) -> None:
        at = 0 if form == "FP8" else 3
        codes = tensors[module + ".weight"].bits
        if form == "FP8":
            codes[:] = 0x80
        else:
            codes[at] = 0
        put(module + scales, 0.0, at)(tensors)
        if form == "static":
            tensors[module + ".quant_bias"].bits[at] = 0

    model = edited(own(family, form), change)
    convert(model, tmp_path / "out", 2)
    assert lint(model).is_sound

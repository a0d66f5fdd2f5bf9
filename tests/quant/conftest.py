"""Small checkpoints of the three families and their int8 forms, made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.int8_checkpoints import (
    Form,
    all_dynamic,
    all_mix,
    all_static,
    compressed_tensors,
    dense_checkpoint,
    modelslim,
    static_attention,
)
from tests.moe_checkpoints import quantise_fp8
from tests.stream.moe_models import BLOCK, DEEPSEEK, QWEN, random_checkpoint

Int8 = Callable[[str, str], Path]
FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")

FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "dynamic": lambda source, out: modelslim(source, out, all_dynamic),
    "static": lambda source, out: modelslim(source, out, all_static),
    "static with biases": lambda source, out: modelslim(source, out, static_attention, Form(biases=True)),
    "mixed": lambda source, out: modelslim(source, out, static_attention),
    "mix": lambda source, out: modelslim(source, out, all_mix),
    "of float16": lambda source, out: modelslim(source, out, static_attention, Form(bits64=True)),
    "shifted": lambda source, out: modelslim(source, out, static_attention, Form(shifted=True, stem="other-name")),
    "compressed": compressed_tensors,
}


def source_of(family: str, root: Path, code: str) -> Path:
    """A checkpoint of values, or of FP8."""
    out = root / f"{family}-{code}"
    if out.exists():
        return out
    if code == "FP8":
        return quantise_fp8(source_of(family, root, "BF16"), out, BLOCK, shards=2)
    if family == "qwen3":
        return dense_checkpoint(out, code)
    return random_checkpoint(out, QWEN if family == "qwen3_moe" else DEEPSEEK, code)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Int8:
    """`source("qwen3", "BF16")`: to be read, never changed."""
    root = tmp_path_factory.mktemp("sources")
    return cache(lambda family, code: source_of(family, root, code))


@pytest.fixture(scope="session")
def int8(source: Int8, tmp_path_factory: pytest.TempPathFactory) -> Int8:
    """`int8("qwen3_moe", "mixed")`: a quantised checkpoint.  To be read, never changed."""
    root = tmp_path_factory.mktemp("int8")

    @cache
    def make(family: str, form: str) -> Path:
        code = "F16" if form == "of float16" else "BF16"
        return FORMS[form](source(family, code), root / f"{family}-{form}")

    return make


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Bytes may stay in the page cache: what power cuts do is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda fd: None)
        yield

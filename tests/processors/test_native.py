"""Every variant that this processor can run serves: a tiny artifact's tokens are transformers'."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from msconv.steps.compile import compile_graphs
from msconv_runtime.kernels.variants import usable
from tests.conftest import Checkpoints
from tests.conversions import convert
from tests.processors.native import tokens_with, transformers_tokens

QUICK = "avx2"  # a laptop's; `make test-processors` takes all that there are
NAMES = [variant.name for variant in usable()]
TAKEN = NAMES if os.environ.get("MSCONV_PROCESSORS") else [name for name in NAMES if name == QUICK] or NAMES[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("variant", TAKEN)
def test_a_session_gives_transformers_tokens(checkpoint: Checkpoints, tmp_path: Path, variant: str) -> None:
    source = checkpoint("bfloat16_shards")
    convert(source, tmp_path / "artifact")
    compile_graphs(tmp_path / "artifact", "cpu")
    assert tokens_with(variant, tmp_path / "artifact") == transformers_tokens(source)

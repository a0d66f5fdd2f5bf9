"""Small artifacts with ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msconv.graph.spec import Fixed
from msconv.steps.compile import compile_graphs
from msconv.verify.prove import prove
from msconv.verify.result import Proof
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.every import one_of_many
from tests.moe_checkpoints import make_deepseek_v3, make_qwen3_moe

every_layout = one_of_many("test-onnx")
has_onnxruntime = find_spec("onnxruntime") is not None
FIXED = Fixed(6, 64, 512)  # all sequences of a proof at once; the longest takes several pieces
FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen3": make_qwen3,
    "qwen3_moe": make_qwen3_moe,
    "deepseek_v3": make_deepseek_v3,
}
TWO_LAYERS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 2},
    "deepseek_v3": {"num_hidden_layers": 2, "max_position_embeddings": 1024},
}


def with_graphs(directory: Path, family: str, fixed: Fixed | None = FIXED, **overrides: Any) -> tuple[Path, Path]:
    """A checkpoint and its artifact with ONNX graphs."""
    source = FAMILIES[family](directory / "source", **overrides)
    root = directory / "artifact"
    convert(source, root)
    compile_graphs(root, "onnx", fixed=fixed)
    return source, root


def proved(source: Path, root: Path) -> Proof:
    """The proof, if it is one, of every form by every runner that is installed."""
    proof = prove(root, "onnx", source)
    assert proof.ok, proof.comparison
    assert proof.comparison.max_abs_logit_error < 1e-4
    forms = {"", "static "} if any("static" in phase for phase in proof.comparison.by_phase) else {""}
    by = {"", "onnxruntime "} if has_onnxruntime else {""}
    phases = ("prefill", "decode", "prefill on a cached prefix", "decode after it", "all tokens")
    assert set(proof.comparison.by_phase) == {f"{form}{b}{p}" for form in forms for b in by for p in phases}
    return proof

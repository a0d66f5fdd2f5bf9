"""Quantised checkpoints that cannot be read, by the name in `quantization_config`, and what to take instead."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

from ..layout.names import shorten

METHODS: Mapping[str, str] = {
    "awq": "AWQ, 4 bits",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors of llm-compressor",
    "fbgemm_fp8": "FP8 with a scale a row, of FBGEMM",
    "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVIDIA ModelOpt, NVFP4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "hqq": "HQQ",
    "quark": "AMD Quark",
    "torchao": "torchao",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "marlin": "Marlin",
    "gguf": "GGUF",
}
INSTEAD = "take the original checkpoint in bfloat16, or one in FP8 with block scales (quant_method fp8)"


def unsupported_method(quant: Mapping[str, object]) -> str:
    """What is wrong with the method that a `quantization_config` names, "" if it is fp8."""
    method = quant.get("quant_method", "fp8" if "weight_block_size" in quant or "fmt" in quant else None)
    if method == "fp8":
        return ""
    if method is None and {"group_size", "bits"} <= quant.keys():
        return f"group_size and bits without quant_method: weights quantised by MLX are not supported; {INSTEAD}"
    known = METHODS.get(method.replace("_", "-").lower(), METHODS.get(method)) if isinstance(method, str) else None
    named = f" ({known})" if known else ""
    return f"quant_method = {shorten(reprlib.repr(method), 80)}{named}: only fp8 is supported; {INSTEAD}"

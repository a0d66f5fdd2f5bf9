"""Quantised checkpoints that cannot be read, by the name in `quantization_config`, and what to take instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .record import shown

METHODS: Mapping[str, str] = {
    "awq": "AWQ, 4 bits",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "bitsandbytes": "bitsandbytes",
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
INSTEAD = (
    "take the original checkpoint in bfloat16, one in FP8 with block scales (quant_method fp8) or in int8 (W8A8)"
)


def unsupported_method(config: Mapping[str, object], supported: Collection[str]) -> str:
    """Why the method that a `quantization_config` names is not one of the supported ones."""
    method = config.get("quant_method")
    if method is None and {"group_size", "bits"} <= config.keys():
        return f"group_size and bits without quant_method: weights quantised by MLX are not supported; {INSTEAD}"
    known = METHODS.get(method.replace("_", "-").lower(), METHODS.get(method)) if isinstance(method, str) else None
    named = f" ({known})" if known else ""
    return f"quant_method = {shown(method)}{named}: only {', '.join(supported)} are supported; {INSTEAD}"

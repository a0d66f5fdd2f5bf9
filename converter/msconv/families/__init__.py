"""Model families: one small file each, holding the weight table and the architecture as data."""

from __future__ import annotations

from msconv_runtime.errors import UsageError

from ..layout.names import shorten
from .config import DecoderConfig, Family, read_config
from .deepseek_v3 import DEEPSEEK_V3, V32
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (QWEN3, QWEN3_MOE, DEEPSEEK_V3)

NEIGHBOURS = {  # look alike, compute something else
    "DeepseekV2ForCausalLM": "DeepSeek-V2 routes by softmax without a correction bias, V3 by sigmoid with one",
    "DeepseekV32ForCausalLM": V32,
    "Qwen3NextForCausalLM": "Qwen3-Next has linear attention layers",
}


def family_of(raw: dict[str, object], where: str) -> Family:
    """The family that reads this config.json.  Raises UsageError naming those there are."""
    named = raw.get("architectures")
    architectures = [a for a in named if isinstance(a, str)] if isinstance(named, list) else []
    for family in FAMILIES:
        if family.architecture in architectures or (not architectures and raw.get("model_type") == family.name):
            return family
    for architecture in architectures:
        if architecture in NEIGHBOURS:
            raise UsageError(
                f"{where}: {architecture} is not supported: {NEIGHBOURS[architecture]}.", _supported()
            )
    found = ", ".join(architectures) or str(raw.get("model_type") or "no architecture")
    raise UsageError(f"{where}: {shorten(found)} is not a supported model family.", _supported())


def _supported() -> str:
    return "Supported are: " + ", ".join(f"{f.architecture} ({f.name})" for f in FAMILIES) + "."


def configure(raw: dict[str, object], where: str) -> tuple[Family, DecoderConfig]:
    """Family and checked configuration of a config.json."""
    family = family_of(raw, where)
    return family, read_config(raw, family, where)


__all__ = ["FAMILIES", "DecoderConfig", "Family", "configure", "family_of", "read_config"]

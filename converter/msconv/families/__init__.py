"""Model families: one small file each, holding the weight table and the architecture as data.

Every Family that a file in this directory makes is one: a new family is a new file, and no line here.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules

from msconv_runtime.errors import UsageError

from ..layout.names import shorten
from .config import DecoderConfig, Family
from .config_json import read_config
from .deepseek_v3 import V32

FAMILIES: tuple[Family, ...] = tuple(
    value
    for name in sorted(module.name for module in iter_modules(__path__))
    for value in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(value, Family)
)

BODY = "it is a body without a head, which computes no logits"
CLASSIFIER = "its head gives values or classes, and no next token"
BODIES = ("Qwen3", "Qwen3Moe", "DeepseekV3")
CLASSES = ("SequenceClassification", "TokenClassification", "RewardModel", "QuestionAnswering")


def family_named(name: str) -> Family | None:
    """The family of this `model_type`, which artifacts record."""
    return next((f for f in FAMILIES if f.name == name), None)


NEIGHBOURS = {  # look alike, compute something else
    "DeepseekV2ForCausalLM": "DeepSeek-V2 routes by softmax without a correction bias, V3 by sigmoid with one",
    "DeepseekV32ForCausalLM": V32,
    "Qwen3NextForCausalLM": "Qwen3-Next has linear attention layers",
    **dict.fromkeys(("Qwen3Model", "Qwen3MoeModel", "DeepseekV3Model"), BODY),
    **dict.fromkeys((f"{name}For{kind}" for name in BODIES for kind in CLASSES), CLASSIFIER),
    "AutoModelForCausalLMWithValueHead": CLASSIFIER,
    "KimiK25ForConditionalGeneration": "Kimi-K2.5 is Kimi-K2 with experts of 4 bits, inside a model of images",
}


def family_of(raw: dict[str, object], where: str) -> Family:
    """The family that reads this config.json.  Raises UsageError naming those there are."""
    named = raw.get("architectures")
    architectures = [a for a in named if isinstance(a, str)] if isinstance(named, list) else []
    kind = raw.get("model_type")
    for family in FAMILIES:
        names = (family.name, *family.aliases)
        if family.architecture in architectures or (not architectures and kind in names and not family.is_draft):
            if kind is not None and kind not in names:
                raise UsageError(
                    f"{where}: architectures says {family.architecture}, model_type {shorten(str(kind))}: who "
                    f"reads the file would choose. model_type {' or '.join(names)} belongs to that architecture.",
                    _supported(),
                )
            return family
    for architecture in architectures:
        if architecture in NEIGHBOURS:
            raise UsageError(
                f"{where}: {architecture} is not supported: {NEIGHBOURS[architecture]}.", _supported()
            )
    found = ", ".join(architectures) or str(raw.get("model_type") or "")
    if not found:
        raise UsageError(f"{where}: names no architecture and no model_type.", _supported())
    raise UsageError(f"{where}: {shorten(found)} is not a supported model family.", _supported())


def _supported() -> str:
    return "Supported are: " + ", ".join(f"{f.architecture} ({f.name})" for f in FAMILIES) + "."


def configure(raw: dict[str, object], where: str, harmless: Iterable[str] = ()) -> tuple[Family, DecoderConfig]:
    """Family and checked configuration of a config.json.  `harmless`: keys that a person says change nothing."""
    family = family_of(raw, where)
    return family, read_config(raw, family, where, harmless)


__all__ = ["FAMILIES", "DecoderConfig", "Family", "configure", "family_named", "family_of", "read_config"]

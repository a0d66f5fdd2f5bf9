"""int8 of compressed-tensors (llm-compressor): the matrices are those of ModelSlim's W8A8_DYNAMIC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from .record import WeightFormat, problem, shown
from .w8a8 import W8A8Dynamic

WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
EMPTY = ("actorder", "block_structure", "group_size")
FREE = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")  # how scales were found, and stored
NOTHING: tuple[object, ...] = (None, {}, [], "")
DENSE = "dense"  # of sparsity_config: how many zeros there are, and all of them are stored


@dataclass(frozen=True, slots=True)
class CompressedInt8(W8A8Dynamic):
    name = "compressed-tensors-int8"
    title = "int8 (compressed-tensors, a scale a token)"
    method = "compressed-tensors"
    keys = frozenset(
        {"quant_method", "format", "config_groups", "kv_cache_scheme", "sparsity_config", "transform_config"}
    )
    harmless: ClassVar[Mapping[str, str]] = {
        "ignore": "the element types in the files say which tensors are quantised",
        "global_compression_ratio": "a statistic",
        "quantization_status": "how far the tool had come",
        "version": "of the tool",
    }

    @classmethod
    def read(cls, config: Mapping[str, object], problems: list[str]) -> Self | None:
        if config.get("quant_method") != cls.method:
            return None
        if config.get("format", "int-quantized") != "int-quantized":
            problems.append(problem("format", config["format"], "only int-quantized is supported"))
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            value = config.get(key)
            is_dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == DENSE
            if value not in NOTHING and not is_dense:
                problems.append(problem(key, value, "not supported"))
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            problems.append(problem("config_groups", groups, "an object with the schemes is needed"))
            return cls()
        for name, group in groups.items():
            _check_group(f"config_groups.{name}", group, problems)
        return cls()

    @property
    def kept_as(self) -> WeightFormat:
        return W8A8Dynamic()


def _check_group(where: str, group: object, problems: list[str]) -> None:
    if not isinstance(group, dict):
        problems.append(problem(where, group, "an object is needed"))
        return
    for key, wanted in (("weights", WEIGHTS), ("input_activations", ACTIVATIONS)):
        scheme = group.get(key)
        if not isinstance(scheme, dict):
            problems.append(problem(f"{where}.{key}", scheme, "int8 weights and int8 activations are needed"))
            continue
        for name, value in scheme.items():
            if name in wanted:
                if value != wanted[name] or type(value) is not type(wanted[name]):
                    problems.append(
                        problem(f"{where}.{key}.{name}", value, f"only {shown(wanted[name])} is supported")
                    )
            elif name not in FREE and value not in NOTHING:
                what = "not supported" if name in EMPTY else "not known"
                problems.append(problem(f"{where}.{key}.{name}", value, what))
        problems += [f"quantization_config: {where}.{key} has no {n}" for n in wanted if n not in scheme]
    if group.get("output_activations") not in NOTHING:
        problems.append(problem(f"{where}.output_activations", group["output_activations"], "not supported"))
    if group.get("format") not in (None, "int-quantized"):
        problems.append(problem(f"{where}.format", group["format"], "only int-quantized is supported"))
    for name in set(group) - {"weights", "input_activations", "output_activations", "format", "targets"}:
        problems.append(problem(f"{where}.{name}", group[name], "not known"))

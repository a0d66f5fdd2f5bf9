"""Weight formats: one file each, independent of any model family.

Every WeightFormat class that a file in this directory makes is one: a new format is a new file, and no line here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules

from msconv_runtime.dtypes import QUANT

from .plain import PLAIN
from .record import Header, MadeFormat, WeightFormat, shown
from .unsupported import unsupported_method

LOOPS = ("compiled", "kernels")  # files that are no formats; numba may be missing

FORMATS: tuple[type[WeightFormat], ...] = tuple(
    value
    for name in sorted(module.name for module in iter_modules(__path__) if module.name not in LOOPS)
    for value in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(value, type)
    and issubclass(value, WeightFormat)
    and value.__module__ == f"{__name__}.{name}"
    and not isabstract(value)
    and value is not type(PLAIN)
)


def read_formats(raw: Mapping[str, object], problems: list[str]) -> tuple[WeightFormat, ...]:
    """The formats in which a config.json says that matrices are stored, besides plain; () if it says nothing.
    What cannot be obeyed is added to `problems`."""
    config = raw.get("quantization_config")
    if not config:
        return ()
    if not isinstance(config, dict):
        problems.append(f"quantization_config = {shown(config)}: an object is needed")
        return ()
    found = tuple(f for kind in FORMATS if (f := kind.read(config, problems)) is not None)
    if not found:
        problems.append(
            "quantization_config: " + unsupported_method(config, dict.fromkeys(kind.method for kind in FORMATS))
        )
    return found


def format_of(matrix: str, headers: Mapping[str, Header], formats: Sequence[WeightFormat]) -> WeightFormat | None:
    """The format in which a checkpoint stores the matrix of this name: one of `formats`, or plain.  None if none
    of them has such element types."""
    return next((f for f in (*formats, PLAIN) if f.claims(matrix, headers)), None)


def formats_named(quant: str) -> tuple[WeightFormat, ...]:
    """The formats of a manifest's `quant`: names with commas between."""
    found = (format_named(name.strip()) for name in quant.split(","))
    return tuple(f for f in found if f is not None)


def format_asked(quant: str | None) -> MadeFormat | None:
    """The format that `--quant` names."""
    found = format_named(QUANT[quant]) if quant else None
    return found if isinstance(found, MadeFormat) else None


def unconfigured(dtype: str) -> WeightFormat | None:
    """The format whose codes have this element type, where no configuration describes it."""
    return next((kind() for kind in FORMATS if kind.element == dtype), None)


def kept_format(matrix: str, types: Collection[str], formats: Sequence[WeightFormat]) -> WeightFormat:
    """The format in which an artifact, whose tensors have the names in `types`, keeps the matrix of this name."""
    return next((f for f in formats if f.is_kept and all(s.of(matrix) in types for s in f.stored)), PLAIN)


def format_named(name: str) -> WeightFormat | None:
    """The format that an artifact is kept in, by its name in the manifest."""
    return next((kind() for kind in FORMATS if kind.name == name), None)


__all__ = [
    "FORMATS",
    "PLAIN",
    "QUANT",
    "MadeFormat",
    "WeightFormat",
    "format_asked",
    "format_named",
    "format_of",
    "formats_named",
    "kept_format",
    "read_formats",
    "unconfigured",
]

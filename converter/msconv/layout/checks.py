"""What does not fit between a weight table, a checkpoint's headers and a layout, collected as text."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from msconv_runtime.dtypes import VALUE_DTYPES

from ..quant import PLAIN, WeightFormat
from ..quant.record import LeftOut, Stored
from .cuts import Mesh, problem
from .model import Output, Sizes, Table, TensorInfo, is_matrix
from .names import fold, listing
from .rules import Part
from .stored import Formats

TP_CHOICES = (1, 2, 4, 8, 16, 32)
WHOLE = ("int32", "int64")  # of whole numbers, where a rule wants them


def dropped_sources(
    table: Table, sizes: Sizes, sources: Mapping[str, TensorInfo], used: set[str]
) -> list[LeftOut]:
    """Sources that no rule takes and a drop names."""
    out = []
    end = sizes.layers + sizes.dims.get("mtp_layers", 0)
    holes = {"{draft}": sizes.draft_layers, "{mtp}": range(sizes.layers + sizes.drafts, end)}
    patterns = []
    for drop in (d for d in table.drops if sizes.holds(d.when)):
        hole = next((h for h in holes if h in drop.pattern), "")
        numbers = holes[hole] if hole else range(1)
        patterns += [(drop.pattern.replace(hole or "{}", str(n)), drop) for n in numbers]
    for name in sources:
        if name in used:
            continue
        for pattern, drop in patterns:
            if fnmatch.fnmatchcase(name, pattern):
                out.append(LeftOut(name, drop.reason, drop.twin))
                break
    return out


def coverage(
    outputs: list[Output],
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    formats: Formats,
    dropped: Sequence[LeftOut],
) -> list[str]:
    """Sources that are missing, unknown, or of another shape than the configuration says."""
    errors: list[str] = []
    missing: list[str] = []
    wrong: dict[str, list[str]] = {}
    used: set[str] = {d.name for d in dropped}

    def expect(name: str, shape: tuple[int, ...], why: str) -> None:
        used.add(name)
        if name not in sources:
            missing.append(name)
        elif sources[name].shape != shape:
            text = f"has shape {list(sources[name].shape)}, {why} {list(shape)}"
            wrong.setdefault(text, []).append(name)

    for output in outputs:
        for part, name in output.sources:
            shape = sizes.shape(part)
            chosen = formats.get(name, PLAIN)
            has_sizes = chosen is PLAIN or chosen in sizes.formats
            if has_sizes and len(shape) == 2:
                shape = chosen.sources[0].shape(*shape)
            expect(name, shape, "the configuration says")
    for name, chosen in formats.items():
        info = sources[name]
        if chosen not in sizes.formats:
            text = (
                f"is {chosen.title}, and config.json has no quantization_config that says how its scales are kept"
            )
            wrong.setdefault(text, []).append(name)
            used.update(chosen.companions(name))
        elif len(info.shape) == 2:  # others are no weights at all: said with their element types
            for tensor in chosen.sources[1:]:
                expect(tensor.of(name), tensor.shape(*info.shape), f"{chosen.needs} need")
    for chosen in sizes.formats:
        errors += chosen.disagreements(sources)
    unused = [name for name in sources if name not in used]
    if missing:
        errors.append(f"Missing from the checkpoint ({len(missing)}):\n{listing(missing)}")
    if unused:
        errors.append(f"In the checkpoint but unknown to this model ({len(unused)}):\n{listing(unused)}")
    for text, bad in wrong.items():
        errors += [f"{name}: {text}." for name, _ in fold(bad)]
    return errors


def common_dtype(
    outputs: list[Output],
    sources: Mapping[str, TensorInfo],
    formats: Formats,
    dtype: str | None,
    odd_types: list[str],
    errors: list[str],
) -> str:
    """The element type that most values have.  What is no value or code of its format goes to `odd_types`, and a
    mixture to `errors`, unless `dtype` says what all shall become."""
    seen: dict[str, list[str]] = {}
    odd: dict[str, list[str]] = {}
    no_weight = f"is not a weight type of this family ({', '.join(VALUE_DTYPES)})"
    for output in outputs:
        for part, name in output.sources:
            info = sources.get(name)
            if info is None:
                continue
            if name in formats and is_matrix(output.rule, part):
                for tensor in formats[name].sources[1:]:
                    companion = sources.get(tensor.of(name))
                    if companion is not None and not _fits(companion.dtype, tensor):
                        text = f"is not what {formats[name].needs} need ({' or '.join(_fitting(tensor))})"
                        odd.setdefault(f"{companion.dtype} {text}", []).append(companion.name)
            elif output.rule.dtype in WHOLE and info.dtype in WHOLE:
                continue
            elif info.dtype not in VALUE_DTYPES:
                odd.setdefault(f"{info.dtype} {no_weight}", []).append(name)
            elif not output.rule.dtype:
                seen.setdefault(info.dtype, []).append(name)
    for text, names in odd.items():
        odd_types += [f"{name}: element type {text}." for name, _ in fold(names)]
    if len(seen) > 1 and dtype is None:
        kinds = "\n".join(f"{d}:\n{listing(names, 4)}" for d, names in seen.items())
        errors.append(
            f"The checkpoint mixes element types; say with --dtype which one the artifact should have.\n{kinds}"
        )
    return max(seen, key=lambda d: len(seen[d])) if seen else "float32"


def _fits(dtype: str, tensor: Stored) -> bool:
    """Whether a companion of this type can be read as the one that its format names."""
    return dtype in _fitting(tensor)


def _fitting(tensor: Stored) -> list[str]:
    """The element types as which a companion can be read."""
    values = VALUE_DTYPES if tensor.dtype in ("", *VALUE_DTYPES) else ()
    return list(dict.fromkeys(kind for kind in (*values, tensor.dtype, tensor.bits) if kind))


def mixtures(outputs: list[Output], formats: Formats) -> list[str]:
    """Matrices that are stored as one, and of which some are kept as codes and others are not."""
    errors = []
    for output in outputs:
        kept = {name: formats.get(name, PLAIN) for part, name in output.sources if is_matrix(output.rule, part)}
        if len(set(kept.values())) > 1 and any(chosen.is_kept for chosen in kept.values()):
            kinds = "; ".join(f"{name} is {chosen.title}" for name, chosen in list(kept.items())[:4])
            errors.append(f"{output.name}: is made of matrices in several weight formats: {kinds}.")
    return errors


def unfit(outputs: list[Output], formats: Formats, quant: WeightFormat | None) -> list[str]:
    """Matrices in a weight format that has no place where they are, and those that are quantised already where
    that is asked."""
    found: dict[str, list[str]] = {}
    for output in outputs:
        for part, name in output.sources:
            chosen = formats.get(name, PLAIN)
            if not chosen.is_kept or not is_matrix(output.rule, part):
                continue
            if output.rule.as_values and not chosen.has_values:
                what = f"is {chosen.title}, and graphs read it as values"
            elif output.rule.stacked and not chosen.of_experts:
                what = f"is {chosen.title}: grouped products of experts have no such scale"
            elif quant is not None:
                what = f"is {chosen.title} already"
            else:
                continue
            found.setdefault(what, []).append(name)
    return [f"{name}: {what}." for what, names in found.items() for name, _ in fold(names)]


def divisions(outputs: list[Output], sizes: Sizes, mesh: Mesh) -> list[str]:
    """What does not split over these ranks."""
    found: dict[str, list[str]] = {}
    known: dict[Part, str] = {}
    for output in outputs:
        for part, name in output.sources:
            if part.cut.over == "moe_tp" and mesh.tp % mesh.ep:
                continue  # said below
            if part not in known:
                known[part] = problem(part.cut, sizes.shape(part), mesh, sizes.dims)
            if known[part]:
                found.setdefault(known[part], []).append(name)
    errors = [f"{name}: {text}." for text, bad in found.items() for name, _ in fold(bad)]
    if mesh.tp % mesh.ep:
        errors.append(f"ep={mesh.ep} does not divide tp={mesh.tp}.")
    if mesh.ep > 1 and not sizes.experts:
        errors.append(f"ep={mesh.ep}: this model has no experts.")
    elif sizes.experts % mesh.ep:
        errors.append(f"{sizes.experts} experts do not split over ep={mesh.ep}.")
    return errors


def other_layout(outputs: list[Output], sizes: Sizes, mesh: Mesh) -> str:
    """Which other tp, or else which other ep, would do."""
    if not divisions(outputs, sizes, mesh):
        return "Try --dtype float32: every value fits."
    for flag, choices in (
        ("--tp", [(str(tp), Mesh(tp, mesh.ep)) for tp in TP_CHOICES]),
        ("--ep", [(str(ep), Mesh(mesh.tp, ep)) for ep in TP_CHOICES]),
        ("--tp", [(f"{tp} --ep {tp}", Mesh(tp, tp)) for tp in TP_CHOICES]),
    ):
        fitting = [text for text, m in choices if m.tp % m.ep == 0 and not divisions(outputs, sizes, m)]
        if fitting:
            several = f"{', '.join(fitting[:-1])} or " if len(fitting) > 1 else ""
            return f"Try {flag} {several}{fitting[-1]}."
    return "Try --tp 1 --ep 1."

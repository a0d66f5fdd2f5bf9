"""The tables of docs/roofline.md, from the recipes and the graphs that msconv makes for them.

python -m docs.rooflines                 writes them anew, some minutes
python -m docs.rooflines Qwen3-8B        prints one recipe's row
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msconv.checkpoint.drafts import with_draft
from msconv.layout.cuts import make_mesh
from msconv.layout.model import expected_sources
from msconv.layout.planning import make_plan
from msconv.location import LocalDirectory
from msconv.published import published
from msconv.quant import format_asked
from msconv.recipes import SHIPPED, Recipe, read_recipe
from msconv.steps.roofline import Asked, Graphs, Phase, bounds_of, made_graphs
from msconv_runtime.roles import DECODE, PREFILL, VERIFY, Role
from msconv_runtime.targets import TARGETS, Figures, Target, figures_named

PAGE = Path(__file__).parent / "roofline.md"
BEGIN, END = "<!-- {}: python -m docs.rooflines -->\n", "<!-- end -->"
GIB = 1 << 30
USUAL = 4096  # tokens of the context, and of the prompt
FACTOR = 3.0  # beyond which a published figure is said to part from the bound
DEVICES = {("ascend910b", 64): "910B2", ("ascend910b", 32): "910B4"}  # of several the fastest: a bound for all
HEAD = ("recipe", "device", "tp, ep", "1 request", "requests x context", "a token", "in all", "prompt", "launches")


@dataclass(frozen=True)
class Published:
    """A figure of somebody else: `tpot_ms`, milliseconds a token of `requests` at a time with `context` tokens on
    average.  `drafts`: tokens that a step verifies, 0 without drafts.  `engine`: whose, and where it is said."""

    engine: str
    address: str
    recipe: str
    device: str
    tp: int
    quant: str
    requests: int
    context: int
    drafts: int
    tpot_ms: float


SGLANG = "https://docs.sglang.io/docs/hardware-platforms/ascend-npus/best_practice/"
VLLM = "https://github.com/vllm-project/vllm-ascend/issues/"
FIGURES = (
    Published("SGLang", SGLANG + "qwen3-8b", "Qwen3-8B", "910C", 2, "w8a8", 1, 4250, 5, 5.0),
    Published("SGLang", SGLANG + "qwen3-8b", "Qwen3-8B", "910C", 2, "w8a8", 16, 6894, 5, 11.79),
    Published("SGLang", SGLANG + "qwen3-8b", "Qwen3-8B", "910C", 1, "w8a8", 64, 4250, 4, 37.0),
    Published("SGLang", SGLANG + "qwen3_32b", "Qwen3-32B", "910C", 16, "", 1, 20000, 5, 6.0),
    Published("SGLang", SGLANG + "qwen3_32b", "Qwen3-32B", "910C", 4, "w8a8", 100, 4352, 4, 50.0),
    Published("SGLang", SGLANG + "qwen3_30b_a3b", "Qwen3-30B-A3B", "910C", 2, "w8a8", 1, 4250, 4, 10.0),
    Published("SGLang", SGLANG + "qwen3_30b_a3b", "Qwen3-30B-A3B", "910C", 2, "w8a8", 16, 6894, 5, 10.25),
    Published("SGLang", SGLANG + "qwen3_30b_a3b", "Qwen3-30B-A3B", "910C", 2, "w8a8", 160, 4250, 4, 50.0),
    Published("SGLang", SGLANG + "qwen3_235b_a22b", "Qwen3-235B-A22B", "910C", 16, "", 1, 11750, 5, 8.0),
    Published("vllm-ascend", VLLM + "1605", "Qwen3-30B-A3B", "910B2", 4, "", 4, 192, 0, 23.89),
    Published("vllm-ascend", VLLM + "4656", "Qwen3-32B", "910B2", 4, "", 1, 15000, 0, 38.0),
    Published("vllm-ascend", VLLM + "4656", "Qwen3-30B-A3B", "910B2", 4, "", 1, 15000, 0, 20.0),
    Published("vllm-ascend", VLLM + "4656", "Qwen3-4B", "910B2", 4, "", 1, 15000, 0, 20.0),
)


def recipe_row(recipe: Recipe) -> tuple[str, ...]:
    """Bounds of one recipe: a request alone, the requests that it is sized for, and a prompt."""
    device = DEVICES.get((recipe.devices.kind, recipe.devices.memory_gib), recipe.devices.kind)
    target, figures = figures_named(device)
    graphs = _graphs(recipe, recipe.tp, recipe.ep, recipe.quant, target)
    alone = bounds_of(graphs, target, figures, Asked(device, USUAL, 1))
    many = bounds_of(graphs, target, figures, Asked(device, recipe.context, recipe.requests)).decode
    return (
        f"[{recipe.name}](../recipes/{recipe.name}.yaml)",
        f"{recipe.tp} x {figures.device}",
        f"{recipe.tp}, {recipe.ep}",
        _ms(alone.decode),
        f"{recipe.requests} x {recipe.context:,}",
        _ms(many),
        _rate(many),
        f"{_ms(alone.prefill)}, {_rate(alone.prefill)}",
        f"{many.work.launches:,}",
    )


def published_row(said: Published, recipe: Recipe) -> tuple[str, ...]:
    """A published figure beside the bounds of our graphs: without drafts, and if all of them were accepted."""
    target, figures = figures_named(said.device)
    role = VERIFY if said.drafts else DECODE
    graphs = _graphs(recipe, said.tp, 1, said.quant, target, (PREFILL, DECODE, role))
    one = bounds_of(graphs, target, figures, Asked(said.device, said.context, said.requests)).decode
    best = one
    if said.drafts:
        asked = Asked(said.device, said.context, said.requests, said.drafts, said.drafts)
        best = bounds_of(graphs, target, figures, asked).decode
    return (
        f"[{said.engine}]({said.address})",
        f"{said.recipe}{', W8A8' if said.quant else ', bfloat16'}",
        f"{said.tp} x {figures.device}",
        f"{said.requests} x {said.context:,}",
        str(said.drafts or ""),
        f"{said.tpot_ms:g} ms",
        _ms(one),
        _times(said, one),
        _ms(best) if said.drafts else "",
        _times(said, best) if said.drafts else "",
    )


def _times(said: Published, phase: Phase) -> str:
    """How many times the bound, as it is shown, a published figure is; apart beyond FACTOR."""
    factor = said.tpot_ms / float(f"{(phase.seconds_per_token or math.inf) * 1e3:.3g}")
    return f"{factor:.1f}" + ", apart" * (factor > FACTOR and phase.role == DECODE.name)


MADE: dict[str, Graphs] = {}


def _graphs(
    recipe: Recipe, tp: int, ep: int, quant: str, target: Target, roles: tuple[Role, ...] = (PREFILL, DECODE)
) -> Graphs:
    """Made once for all recipes whose graphs are the same: those of 910B and 910C are."""
    root = published(recipe.model)
    assert root is not None, f"{recipe.model}: its configuration does not come with msconv"
    checkpoint = with_draft(LocalDirectory(root).open_configuration(), True)
    table, sizes = checkpoint.family.table, checkpoint.config.sizes()
    sources = expected_sources(table, sizes, checkpoint.config.dtype or "bfloat16", quantised=True)
    plan = make_plan(table, sizes, sources, make_mesh(tp, ep), recipe.dtype, quant=format_asked(quant or None))
    types = sorted((t.name, t.dtype) for t in plan.tensors)
    facts = replace(target, name="", figures=(), devices=(), chip=None)
    key = repr((checkpoint.config, plan.mesh, types, facts, roles))
    if key not in MADE:
        MADE[key] = made_graphs(checkpoint.config, plan, target, tuple(dict.fromkeys(roles)))
    return MADE[key]


def _ms(phase: Phase) -> str:
    """Milliseconds a token, or of a whole prompt; `or more` where a part of the bound is not known."""
    seconds = phase.bound.seconds if phase.role == PREFILL.name else phase.seconds_per_token
    if seconds is None:
        return "no figure"
    return f"{seconds * 1e3:.3g} ms" + " *" * bool(phase.bound.unknown)


def _rate(phase: Phase) -> str:
    return "no figure" if phase.tokens_per_second is None else f"{phase.tokens_per_second:,.0f}/s"


def figures_rows() -> Iterator[tuple[str, ...]]:
    """The devices' published figures."""
    for target in TARGETS.values():
        for f in target.figures:
            yield (
                f.device,
                target.name,
                *_of(f),
                " ".join(f"[{i}]({a})" for i, (_, a) in enumerate(f.sources, 1)),
            )


def _of(f: Figures) -> Iterator[str]:
    scales = ((f.memory_bytes_per_s, 1e12, "TB/s"), (f.half_ops_per_s, 1e12, "T"), (f.int8_ops_per_s, 1e12, "T"))
    for rate, scale, unit in (*scales, (f.link_bytes_per_s, 1e9, "GB/s"), (f.outer_bytes_per_s, 1e9, "GB/s")):
        yield "unknown" if rate is None else f"{rate / scale:g} {unit}"


def recipes() -> list[Recipe]:
    return [read_recipe(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def tables(say: bool = False) -> dict[str, str]:
    """Each table's text by its name on the page."""
    by_name = {r.name: r for r in recipes()}
    rows = []
    for recipe in by_name.values():
        rows.append(recipe_row(recipe))
        if say:
            print(recipe.name, file=sys.stderr)
    compared = [published_row(said, by_name[said.recipe]) for said in FIGURES]
    heads = (
        "device",
        "graphs of",
        "memory",
        "half products",
        "int8 products",
        "link",
        "between machines",
        "sources",
    )
    said = (
        "published by",
        "model",
        "devices",
        "requests x context",
        "drafts",
        "published",
        "bound",
    )
    return {
        "figures": table(heads, list(figures_rows())),
        "recipes": table(HEAD, rows),
        "published": table((*said, "times it", "all accepted", "times it"), compared),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def found(page: str, name: str) -> str:
    """The table of that name as it is on the page."""
    return page.partition(BEGIN.format(name))[2].partition(END)[0].strip("\n")


def main() -> None:
    if names := sys.argv[1:]:
        for recipe in (r for r in recipes() if r.name in names):
            print("| " + " | ".join(recipe_row(recipe)) + " |")
        return
    made = tables(say=True)
    page = PAGE.read_text()
    for name, text in made.items():
        before, begin, rest = page.partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        assert begin and end, f"{PAGE}: has no place for {name}"
        page = f"{before}{begin}\n{text}\n{end}{after}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()

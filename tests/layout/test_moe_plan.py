"""Plans of the published models with experts: every tensor, every rectangle, every rank."""

from __future__ import annotations

import json
import math
import re
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from msconv.families import configure
from msconv.layout.cuts import Mesh
from msconv.layout.memory import kv_bytes_per_token
from msconv.layout.model import TensorInfo
from msconv.layout.plan import Move, Plan
from msconv.layout.planning import make_plan
from msconv.location import LocalDirectory
from msconv.steps.compile import begin_without_weights
from msconv.steps.estimate import estimate
from msconv.steps.reshard import prepare as prepare_reshard
from msconv_runtime.dtypes import BY_CODE
from msconv_runtime.errors import PlanError, UsageError
from tests.commands import run_msconv, run_python
from tests.conversions import prepare
from tests.published import Tensors, deepseek_v3, nbytes, qwen3_moe, write_sparse

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
LISTS: dict[str, Callable[..., Tensors]] = {
    "DeepSeek-V3": deepseek_v3,
    "DeepSeek-R1": deepseek_v3,
    "Qwen3-30B-A3B": qwen3_moe,
    "Qwen3-235B-A22B": qwen3_moe,
}
BILLIONS = {"DeepSeek-V3": 671.026, "DeepSeek-R1": 671.026, "Qwen3-30B-A3B": 30.532, "Qwen3-235B-A22B": 235.094}
LAYOUTS = [
    ("DeepSeek-V3", 1, 1),
    ("DeepSeek-V3", 16, 16),
    ("DeepSeek-V3", 16, 4),
    ("DeepSeek-R1", 8, 8),
    ("Qwen3-30B-A3B", 4, 2),
    ("Qwen3-30B-A3B", 16, 2),
    ("Qwen3-235B-A22B", 64, 16),
]
EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
EVERYWHERE = re.compile(
    r"norm\.weight$|\.q_a_proj\.|\.kv_a_proj_with_mqa\.|\.eh_proj\.|\.mlp\.gate\.weight$|e_score_correction_bias$"
)
Rectangle = tuple[int, int, int, int]  # rows [a, b), columns [c, d)


@cache
def config_of(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


@cache
def sources_of(name: str) -> dict[str, TensorInfo]:
    return infos(LISTS[name](config_of(name)))


def infos(tensors: Tensors) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, BY_CODE[c].name, s, nbytes=nbytes(c, s)) for n, (c, s) in tensors.items()}


@cache
def plan_of(name: str, tp: int, ep: int, dtype: str | None = None) -> Plan:
    family, config = configure(config_of(name), name)
    return make_plan(family.table, config.with_draft().sizes(), sources_of(name), Mesh(tp, ep), dtype)


def small_plan(
    config: dict[str, Any], tp: int, ep: int, *changes: Callable[[dict[str, TensorInfo]], None]
) -> Plan:
    """Of a published model whose configuration was changed, and then its tensors."""
    build = deepseek_v3 if config["model_type"] == "deepseek_v3" else qwen3_moe
    sources = infos(build(config))
    for change in changes:
        change(sources)
    family, read = configure(config, "small")
    return make_plan(family.table, read.sizes(), sources, Mesh(tp, ep))


def few_layers(name: str, **changes: Any) -> dict[str, Any]:
    few = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    return {**config_of(name), **few, **changes}


def refused(
    config: dict[str, Any], tp: int, ep: int, *changes: Callable[[dict[str, TensorInfo]], None]
) -> PlanError:
    with pytest.raises(PlanError) as caught:
        small_plan(config, tp, ep, *changes)
    return caught.value


# Names


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS)
def test_every_published_tensor_is_moved_or_a_scale_or_dropped_with_a_reason(name: str, tp: int, ep: int) -> None:
    plan, sources = plan_of(name, tp, ep), sources_of(name)
    kinds = [
        set(plan.moves),
        {s for n in plan.moves for s in plan.decoded_with(n)},
        {d.name for d in plan.dropped},
    ]
    assert set.union(*kinds) == set(sources)
    assert sum(map(len, kinds)) == len(sources)
    assert set(plan.formats) == {n for n, s in sources.items() if s.dtype == "float8_e4m3fn"} - kinds[2]
    has_draft = name.startswith("DeepSeek")
    mtp = {n for n in sources if has_draft and n.startswith("model.layers.61.")}
    assert len(mtp) == (782 + 776 + 6 if has_draft else 0)
    copies = {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }
    assert {d.name: d.twin for d in plan.dropped} == (copies if has_draft else {})
    assert all(d.reason == f"the draft's copy of {d.twin}" for d in plan.dropped)
    assert {n for n in mtp - kinds[1] if n not in copies} == {n for n in plan.moves if plan.sizes.is_of_draft(n)}
    assert sorted(n for unit in plan.units for n in unit) == sorted(plan.moves)


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS)
def test_parameters_are_the_published_ones_in_any_layout(name: str, tp: int, ep: int) -> None:
    plan = plan_of(name, tp, ep)
    assert round(plan.parameters / 1e9, 3) == BILLIONS[name]
    dropped = {d.name for d in plan.dropped}
    assert plan.read_bytes == sum(s.nbytes for n, s in sources_of(name).items() if n not in dropped)
    if plan.sizes.drafts:  # a layer of experts, and the matrix that joins two hidden states
        assert round(sum(math.prod(s.shape) for s in drafts_of(plan)) / 1e9, 2) == 11.61


def drafts_of(plan: Plan) -> list[TensorInfo]:
    """Source tensors of the layer that guesses further tokens, without scales."""
    return [plan.sources[n] for n in plan.moves if n.startswith("model.layers.61.")]


# Rectangles


def wanted(
    name: str, shape: tuple[int, ...], config: dict[str, Any], tp: int, ep: int, rank: int
) -> set[Rectangle]:
    """What of a published tensor this rank has, as Megatron and SGLang divide it."""
    rows, cols = shape[0], math.prod(shape[1:])
    if EVERYWHERE.search(name):
        return {(0, rows, 0, cols)}
    ways, mine = tp, rank
    if expert := EXPERT.search(name):
        ways, mine = tp // ep, rank % (tp // ep)
        if int(expert[1]) * ep // config.get("n_routed_experts", config.get("num_experts")) != rank // ways:
            return set()
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        step = -(-rows // tp)
        return {(rank * step, min(rows, (rank + 1) * step), 0, cols)} if rank * step < rows else set()
    if re.search(r"\.(o|down)_proj\.", name):
        return {(0, rows, cols * mine // ways, cols * (mine + 1) // ways)}
    if re.search(r"\.[kv]_proj\.", name):
        heads = config["num_key_value_heads"]
        ways, mine = min(tp, heads), rank * min(tp, heads) // tp
    if ".kv_b_proj." in name:
        nope, v = config["qk_nope_head_dim"], config["v_head_dim"]
        heads = config["num_attention_heads"] // tp
        starts = [h * (nope + v) for h in range(rank * heads, (rank + 1) * heads)]
        keys = {(s, s + nope, 0, cols) for s in starts}
        return keys | {(s + nope, s + nope + v, 0, cols) for s in starts}
    return {(rows * mine // ways, rows * (mine + 1) // ways, 0, cols)}


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS)
def test_every_rectangle_of_every_source_is_on_exactly_the_ranks_that_need_it(name: str, tp: int, ep: int) -> None:
    plan, config = plan_of(name, tp, ep), config_of(name)
    known: dict[Any, list[set[Rectangle]]] = {}
    for source, moves in plan.moves.items():
        shape = plan.sources[source].shape
        owners = [(m.cut, m.owner) for m in moves]
        kind = (re.sub(r"\d+", "#", source), shape, *owners)
        if kind not in known:  # cuts do not know the layer
            found: list[set[Rectangle]] = [set() for _ in range(tp)]
            for move in moves:
                for rank in plan.ranks(move):
                    for b in plan.boxes(source, move, rank):
                        box = (b.row, b.row + b.rows, b.col, b.col + b.cols)
                        assert box not in found[rank], source
                        found[rank].add(box)
            known[kind] = found
            for rank in range(tp):
                assert found[rank] == wanted(source, shape, config, tp, ep, rank), (source, rank)
        if expert := EXPERT.search(source):
            experts = config.get("n_routed_experts", config.get("num_experts"))
            assert [m.owner for m in moves] == [int(expert[1]) * ep // experts], source


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS)
def test_the_parts_of_a_rank_fill_its_tensors_once(name: str, tp: int, ep: int) -> None:
    """Nothing lies on anything else, and only vocabulary rows beyond the last are left open."""
    plan = plan_of(name, tp, ep)
    filled: Counter[tuple[int, int, int]] = Counter()  # (tensor, part, group of expert-parallel ranks)
    columns: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    sizes: dict[Any, int] = {}
    for source, moves in plan.moves.items():
        shape = plan.sources[source].shape
        for move in moves:
            key = (move.cut, shape, move.owner)
            if key not in sizes:
                sizes[key] = sum(b.rows * b.cols for b in plan.boxes(source, move, plan.ranks(move)[0]))
            place = (move.tensor, move.part, max(0, move.owner))
            filled[place] += sizes[key]
            if move.column >= 0:
                height = plan.tensors[move.tensor].shape[1]
                columns.setdefault(place, []).append((move.column, sizes[key] // height))
    for place, elements in filled.items():
        tensor = plan.tensors[place[0]]
        item = {"float32": 4, "int32": 4}.get(tensor.dtype, 2)
        assert elements * item == tensor.parts[place[1]], tensor.name
    for place, spans in columns.items():
        end = 0
        for begin, width in sorted(spans):
            assert begin == end
            end += width
        assert end == plan.tensors[place[0]].shape[2]
    groups = {t: ep if len(tensor.shape) == 3 else 1 for t, tensor in enumerate(plan.tensors)}
    constants = {c.tensor for c in plan.constants}
    expected = {
        (t, part, group)
        for t, tensor in enumerate(plan.tensors)
        for part in range(len(tensor.parts))
        for group in range(groups[t])
        if t not in constants
    }
    assert set(filled) == expected


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS)
def test_headers_describe_the_files_without_holes(name: str, tp: int, ep: int) -> None:
    plan = plan_of(name, tp, ep)
    seen: set[str] = set()
    for file in plan.files:
        (length,) = struct.unpack("<Q", file.header[:8])
        assert len(file.header) == 8 + length
        end = 0
        for tensor, entry in json.loads(file.header[8:]).items():
            if tensor != "__metadata__":
                assert entry["data_offsets"][0] == end
                end = entry["data_offsets"][1]
                size = math.prod(entry["shape"]) * {"BF16": 2, "F32": 4, "I32": 4}[entry["dtype"]]
                assert end - entry["data_offsets"][0] == size
                assert tensor not in seen
                seen.add(tensor)
        assert len(file.header) + end == file.size
    assert seen == {t.name for t in plan.tensors}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (16, 16), (16, 4)])
def test_deepseeks_tensors_have_the_shapes_that_grouped_products_want(tp: int, ep: int) -> None:
    shapes = {t.name: (t.shape, t.dtype) for t in plan_of("DeepSeek-V3", tp, ep).tensors}
    mlp, attention = "model.layers.60.mlp.", "model.layers.60.self_attn."
    ffn = 2048 * ep // tp
    assert shapes[mlp + "experts.gate_up_proj.weight"] == ((256 // ep, 7168, 2 * ffn), "bfloat16")
    assert shapes[mlp + "experts.down_proj.weight"] == ((256 // ep, ffn, 7168), "bfloat16")
    assert shapes[mlp + "shared_experts.gate_up_proj.weight"] == ((2 * 2048 // tp, 7168), "bfloat16")
    assert shapes[mlp + "shared_experts.down_proj.weight"] == ((7168, 2048 // tp), "bfloat16")
    assert shapes[mlp + "gate.weight"] == ((256, 7168), "bfloat16")
    assert shapes[mlp + "gate.e_score_correction_bias"] == ((256,), "float32")
    assert shapes[attention + "kv_b_proj_k.weight"] == ((128 * 128 // tp, 512), "bfloat16")
    assert shapes[attention + "kv_b_proj_v.weight"] == ((128 * 128 // tp, 512), "bfloat16")
    assert shapes[attention + "q_b_proj.weight"] == ((128 * 192 // tp, 1536), "bfloat16")
    assert shapes["model.layers.2.mlp.gate_up_proj.weight"] == ((2 * 18432 // tp, 7168), "bfloat16")
    draft = {n.replace(".61.", ".60."): s for n, s in shapes.items() if n.startswith("model.layers.61.")}
    assert draft.items() >= {n: s for n, s in shapes.items() if n.startswith("model.layers.60.")}.items()
    assert draft["model.layers.60.eh_proj.weight"] == ((7168, 14336), "bfloat16")
    assert ("expert_start" in shapes) == (ep > 1)


@pytest.mark.parametrize(("tp", "ep"), [(16, 16), (16, 4), (32, 8)])
def test_ranks_know_their_first_expert(tp: int, ep: int) -> None:
    plan = plan_of("Qwen3-30B-A3B", tp, ep)
    (constant,) = (c for c in plan.constants if c.kind == "expert_start")
    found = [struct.unpack("<i", plan.constant_bytes(constant, rank))[0] for rank in range(tp)]
    assert found == [rank // (tp // ep) * (128 // ep) for rank in range(tp)]


def test_another_element_type_leaves_router_and_bias_alone() -> None:
    plan = plan_of("DeepSeek-V3", 16, 16, "float16")
    kinds = {t.name.split(".", 3)[-1]: t.dtype for t in plan.tensors if t.name.startswith("model.layers.7.")}
    assert kinds.pop("mlp.gate.weight") == "bfloat16"
    assert kinds.pop("mlp.gate.e_score_correction_bias") == "float32"
    assert set(kinds.values()) == {"float16"}


def test_the_same_tensors_in_another_order_give_the_same_plan() -> None:
    config = few_layers("DeepSeek-V3", n_routed_experts=16)
    sources = infos(deepseek_v3(config))
    family, read = configure(config, "small")
    plans = [
        make_plan(family.table, read.sizes(), given, Mesh(8, 4))
        for given in (sources, dict(reversed(sources.items())))
    ]
    assert (plans[0].tensors, plans[0].files, plans[0].moves) == (plans[1].tensors, plans[1].files, plans[1].moves)


# The cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (16, 16), (32, 4)])
def test_a_latent_cache_is_whole_on_every_rank(tp: int, ep: int, dtype: str) -> None:
    sizes = configure(config_of("DeepSeek-V3"), "x")[1].sizes()
    item = {"bfloat16": 2, "float32": 4}[dtype]
    assert kv_bytes_per_token(sizes, Mesh(tp, ep), dtype) == 61 * (512 + 64) * item


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 2), (4, 1), (16, 1)])
def test_a_cache_of_heads_is_divided_as_before(tp: int, heads: int) -> None:
    sizes = configure(config_of("Qwen3-30B-A3B"), "x")[1].sizes()
    assert kv_bytes_per_token(sizes, Mesh(tp, tp), "bfloat16") == 48 * 2 * heads * 128 * 2


# Refusals


def test_everything_wrong_with_experts_is_said_at_once_and_folded() -> None:
    def harm(sources: dict[str, TensorInfo]) -> None:
        for expert in range(16):
            del sources[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        sources[name] = replace(sources[name], shape=(7, 7))
        name = "model.layers.1.mlp.experts.16.down_proj.weight"
        sources[name] = TensorInfo(name, "float8_e4m3fn", (7168, 2048))
        del sources["model.layers.1.mlp.gate.e_score_correction_bias"]

    error = refused(few_layers("DeepSeek-V3", n_routed_experts=16), 3, 3, harm)
    assert "Missing from the checkpoint (17)" in error.message
    assert "model.layers.1.mlp.experts.{0..15}.up_proj.weight  (16 tensors)" in error.message
    assert "e_score_correction_bias" in error.message
    assert "model.layers.1.mlp.experts.16.down_proj.weight" in error.message
    assert "model.layers.1.mlp.experts.3.down_proj.weight: has shape [7, 7]" in error.message
    assert "[7168, 2048]" in error.message
    assert "16 experts do not split over ep=3" in error.message
    assert "128 heads do not split over tp=3" in error.message


def test_a_missing_scale_is_missing() -> None:
    scale = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"
    error = refused(few_layers("DeepSeek-V3"), 1, 1, lambda s: s.pop(scale) and None)
    assert "Missing from the checkpoint (1)" in error.message
    assert scale in error.message


def test_experts_that_do_not_divide_name_the_number_and_what_would() -> None:
    error = refused(few_layers("DeepSeek-V3", n_routed_experts=24), 16, 16)
    assert "24 experts do not split over ep=16." in error.message
    assert error.hint == "Try --ep 1, 2, 4 or 8."


def test_the_width_of_an_expert_that_does_not_divide_names_its_ranks() -> None:
    error = refused(few_layers("DeepSeek-V3", moe_intermediate_size=36, n_shared_experts=4), 16, 2)
    assert "36 rows do not split over the 8 ranks of an expert (tp=16 ep=2)" in error.message
    assert "36 columns do not split over the 8 ranks of an expert (tp=16 ep=2)" in error.message
    assert "model.layers.1.mlp.experts.{0..255}.gate_proj.weight" in error.message
    assert "--tp 2, 4 or 8" in error.hint


def test_expert_parallelism_without_experts_is_refused() -> None:
    family, read = configure(config_of("Qwen3-8B"), "dense")
    from msconv.layout.model import expected_sources

    sources = expected_sources(family.table, read.sizes(), "bfloat16")
    with pytest.raises(PlanError) as caught:
        make_plan(family.table, read.sizes(), sources, Mesh(4, 2))
    assert "this model has no experts" in caught.value.message
    assert caught.value.hint == "Try --ep 1."


@pytest.mark.parametrize(("tp", "ep"), [(4, 3), (2, 4), (1, 2), (3, 2)])
@pytest.mark.parametrize("command", ["convert", "plan", "compile", "reshard"])
def test_ep_that_does_not_divide_tp_is_wrong_use_in_every_command(
    command: str, tp: int, ep: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Qwen3-30B-A3B")))
    out = tmp_path / "out"
    with pytest.raises(UsageError) as caught:
        if command == "convert":
            prepare(tmp_path, tp, ep, output=out)
        elif command == "plan":
            estimate(LocalDirectory(tmp_path), tp, ep, None, out, 1, None, 1, 1, None)
        elif command == "compile":
            begin_without_weights(LocalDirectory(tmp_path), tp, ep, out)
        else:
            prepare_reshard(tmp_path, tp, ep, out)
    assert caught.value.exit_code == 2
    assert f"tp {tp}" in caught.value.message
    assert f"ep {ep}" in caught.value.message
    assert not out.exists()


# The commands

# `msconv`, and how much memory it had at most, on stderr
MEASURED = """
import atexit, sys
from pathlib import Path
def say():
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")), file=sys.stderr)
atexit.register(say)
from msconv.cli import main
main()
"""


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole published list, 688 GB of zeros that take no room."""
    model = tmp_path_factory.mktemp("sparse") / "DeepSeek-V3"
    return write_sparse(model, config_of("DeepSeek-V3"), LISTS["DeepSeek-V3"](config_of("DeepSeek-V3")), 163)


@pytest.mark.parametrize("command", [("plan",), ("convert", "--dry-run")])
def test_671_billion_parameters_are_planned_in_little_memory_and_time(
    deepseek: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    options = (*command, "--model", deepseek, "--tp", 16, "--ep", 16, "--output", tmp_path / "out", "--json")
    begun = time.monotonic()
    done = run_python(MEASURED, *options)
    assert time.monotonic() - begun < 60
    assert done.code == 0, done.stderr
    plan, found = plan_of("DeepSeek-V3", 16, 16), done.json
    assert found["output_bytes"] == plan.output_bytes
    assert [rank["weight_bytes"] for rank in found["ranks"]] == [plan.rank_bytes] * 16
    assert [rank["kv_bytes_per_token"] for rank in found["ranks"]] == [62 * 576 * 2] * 16
    if command == ("plan",):
        assert (found["family"], found["dtype"]) == ("deepseek_v3", "bfloat16")
        assert found["parameters"] == plan.parameters
        assert found["source_bytes"] == plan.read_bytes
        assert found["download_bytes"] == 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak
    assert int(peak[1]) << 10 < min(found["peak_memory_bytes"], 300 << 20)
    assert not (tmp_path / "out").exists()


def test_a_quantised_plan_does_not_depend_on_where_the_shapes_come_from(tmp_path: Path) -> None:
    """Above all, what is still to be downloaded is FP8."""
    config = few_layers("DeepSeek-V3", n_routed_experts=16, num_nextn_predict_layers=1)
    stored = write_sparse(tmp_path / "stored" / "model", config, deepseek_v3(config), 3)
    configured = tmp_path / "configured" / "model"
    configured.mkdir(parents=True)
    (configured / "config.json").write_text(json.dumps(config))
    a, b = (
        estimate(LocalDirectory(m), 4, 2, None, tmp_path / "out", 1, None, 1, 1, None)
        for m in (stored, configured)
    )
    assert b.plan.parameters == a.plan.parameters
    assert b.plan.output_bytes == a.plan.output_bytes
    assert b.plan.read_bytes == a.plan.read_bytes
    assert b.download_bytes == a.plan.read_bytes


def test_the_next_command_that_plan_names_has_the_same_layout(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Qwen3-30B-A3B")))
    done = run_msconv("plan", "--model", tmp_path, "--tp", 4, "--ep", 2, cwd=tmp_path)
    assert done.code == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "msconv convert" in line)
    assert "--tp 4" in line
    assert "--ep 2" in line


def test_a_move_is_for_the_ranks_of_its_owner_only() -> None:
    plan = plan_of("Qwen3-30B-A3B", 16, 2)
    cut = next(iter(plan.moves.values()))[0].cut
    assert plan.ranks(Move(0, 0, cut)) == list(range(16))
    assert plan.ranks(Move(0, 0, cut, owner=0)) == list(range(8))
    assert plan.ranks(Move(0, 0, cut, owner=1)) == list(range(8, 16))

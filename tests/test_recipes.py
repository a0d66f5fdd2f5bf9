"""Recipes: those that are shipped fit their devices, and what is wrong in one is named with its place."""

from __future__ import annotations

import datetime
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msconv.families import configure
from msconv.layout.cuts import make_mesh
from msconv.layout.memory import DeviceMemory, kv_bytes_per_token
from msconv.layout.model import Sizes, Table, TensorInfo, expected_sources
from msconv.layout.planning import make_plan
from msconv.quant import format_asked
from msconv.recipes import (
    DIRECTORY,
    MAX_BYTES,
    Recipe,
    RecipeError,
    all_recipes,
    find_recipe,
    near_names,
    parse_recipe,
    read_recipe,
)
from msconv_runtime.errors import UsageError
from tests.commands import run_msconv

CONFIGS = Path(__file__).parent / "data" / "configs"
MODELS = {
    *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")),
    *(f"Qwen/Qwen3-{name}-Instruct-2507" for name in ("4B", "30B-A3B", "235B-A22B")),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    *(f"deepseek-ai/DeepSeek-{name}" for name in ("V3", "V3-0324", "V3.1", "R1", "R1-0528")),
    *(f"moonshotai/{name}" for name in ("Kimi-K2-Instruct", "Moonlight-16B-A3B")),
}
GOOD = b"""
model: owner/name
tp: 4
dtype: bfloat16
targets: [ascend910b, cpu]
devices: {kind: ascend910b, count: 4, memory_gib: 64}
context: 1024
requests: 2
serve: {mem-fraction-static: 0.9, disable-radix-cache: true, enable-metrics: false}
verified_on:
  - {what: convert, device: cpu, when: 2026-01-31, versions: {msconv: 0.1.0}}
"""
SHIPPED = list(all_recipes())


def recipe(name: str) -> Recipe:
    return read_recipe(all_recipes()[name])


def parse(text: bytes) -> Recipe:
    return parse_recipe(text, Path("mine.yaml"))


# Those that are shipped


@cache
def model_of(repository: str) -> tuple[Table, Sizes, dict[str, TensorInfo], int]:
    """The model as published: its table, sizes and headers, and how many positions it has."""
    path = CONFIGS / f"{repository.partition('/')[2]}.json"
    family, config = configure(json.loads(path.read_text()), str(path))
    sizes = config.with_draft().sizes()
    sources = expected_sources(family.table, sizes, config.dtype or "bfloat16", quantised=True)
    return family.table, sizes, sources, config.max_positions


def test_every_model_has_a_recipe_under_its_own_name() -> None:
    assert {recipe(n).model for n in SHIPPED} == MODELS
    assert {m.partition("/")[2] for m in MODELS} <= set(SHIPPED)
    assert all(n.startswith(recipe(n).model.partition("/")[2]) for n in SHIPPED)


def test_recipes_are_sized_for_each_kind_of_device() -> None:
    sizes = {(r.devices.kind, r.devices.memory_gib) for r in map(recipe, SHIPPED)}
    assert sizes == {("ascend910b", 64), ("ascend910b", 32), ("ascend910c", 64), ("ascend310p", 42)}


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_and_cache_fit_the_devices_of_the_recipe(name: str) -> None:
    r = recipe(name)
    table, sizes, sources, positions = model_of(r.model)
    plan = make_plan(table, sizes, sources, make_mesh(r.tp, r.ep), r.dtype, quant=format_asked(r.quant))
    needed = DeviceMemory(plan.rank_bytes, kv_bytes_per_token(sizes, plan.mesh, plan.dtype), r.context, r.requests)
    assert needed.fits(r.devices.memory_gib << 30), f"{needed.total_bytes / 2**30:.2f} GiB"
    assert r.context <= positions


QUANTISED = [name for name in SHIPPED if recipe(name).quant]


def test_models_that_ascend_serves_in_int8_have_a_recipe_for_it() -> None:
    """Those of SGLang's best practice for Ascend that are of a family here: docs/platforms/ascend, 0.5.23."""
    models = {"DeepSeek-R1", "Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"}
    models |= {"Qwen3-Coder-480B-A35B-Instruct"}
    assert {f"{m}-w8a8{kind}" for m in models for kind in ("", "-910c")} <= set(QUANTISED)
    r = recipe("DeepSeek-R1-w8a8")
    assert (r.devices.count, r.devices.memory_gib, r.context) == (16, 64, 32768)


@pytest.mark.parametrize("name", QUANTISED)
def test_int8_takes_about_half_of_bfloat16(name: str) -> None:
    r = recipe(name)
    table, sizes, sources, _ = model_of(r.model)
    half, whole = (
        make_plan(table, sizes, sources, make_mesh(r.tp, r.ep), r.dtype, quant=quant).rank_bytes
        for quant in (format_asked(r.quant), None)
    )
    assert 0.5 < half / whole < 0.62
    assert name.partition("-w8a8")[0] == r.model.partition("/")[2]


def test_plan_and_a_recipe_say_the_same_size(tmp_path: Path) -> None:
    """`plan` of the configuration alone, with the recipe's values."""
    r = recipe("DeepSeek-R1-w8a8")
    table, sizes, sources, _ = model_of(r.model)
    plan = make_plan(table, sizes, sources, make_mesh(r.tp, r.ep), r.dtype, quant=format_asked(r.quant))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((CONFIGS / "DeepSeek-R1.json").read_bytes())
    done = run_msconv("plan", "--model", tmp_path / "model", "--recipe", "DeepSeek-R1-w8a8", "--json")
    assert done.code == 0, done.stderr
    assert done.json["quant"] == "w8a8-dynamic"
    assert done.json["fits"]
    assert [rank["weight_bytes"] for rank in done.json["ranks"]] == [plan.rank_bytes] * 16


@pytest.mark.parametrize("name", SHIPPED)
def test_no_recipe_claims_a_device_that_nothing_ran_on(name: str) -> None:
    assert {run.device for run in recipe(name).verified_on} <= {"cpu"}


def test_kinds_of_devices_are_the_targets_of_compile() -> None:
    for name, kind in (("cpu", "cpu"), ("ascend310p", "npu")):
        edited = GOOD.replace(b"ascend910b", name.encode()).replace(b"bfloat16", b"float16")
        assert parse(edited).device == kind


# Reading


def test_a_recipe_is_read_whole() -> None:
    r = parse(GOOD)
    assert (r.name, r.path, r.model, r.tp, r.ep, r.source) == (
        "mine",
        "mine.yaml",
        "owner/name",
        4,
        1,
        "owner/name",
    )
    assert r.verified_on[0].when == datetime.date(2026, 1, 31)
    assert r.serve_flags() == {
        "--context-length": "1024",
        "--max-running-requests": "2",
        "--mem-fraction-static": "0.9",
        "--disable-radix-cache": "",
    }
    assert parse(GOOD + b"revision: v1.0\n").source == "owner/name@v1.0"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"tp: 4", b"tp: four", "tp: expected int, got str"),
        (b"tp: 4", b"tp: true", "tp: expected int, got bool"),
        (b"tp: 4", b"tp: 0", "tp: expected int >= 1"),
        (b"tp: 4\n", b"", "tp: is missing"),
        (b"tp: 4", b"tp: 4\ntp: 2", "line 4: tp: this key is there twice"),
        (b"tp: 4", b"tp: 4\ntpp: 2", "tpp: unknown key"),
        (b"tp: 4", b"tp: 4\nname: x", "name: unknown key"),
        (b"tp: 4", b"tp: 4\nep: 3", "ep 3 does not divide tp 4"),
        (b"tp: 4", b"tp: 8", "devices.count 4: tp 8 takes one device a rank"),
        (b"count: 4", b"count: [4]", "devices.count: expected int, got array"),
        (b"count: 4", b"coutn: 4", "devices.coutn: unknown key"),
        (b"count: 4", b"count: 4, count: 5", "line 6: count: this key is there twice"),
        (b"count: 4", b"count: 4, nodes: 3", "devices: 4 devices do not divide over 3 nodes"),
        (b"[ascend910b, cpu]", b"[cpu]", "devices.kind ascend910b is not among them"),
        (
            b"[ascend910b, cpu]",
            b"[ascend910b, abacus]",
            "targets 'abacus': no such target, known are cpu, ",
        ),
        (b"[ascend910b, cpu]", b"[]", "targets: expected array of length >= 1"),
        (b"bfloat16", b"int8", "dtype: invalid enum value 'int8', known are bfloat16, float16, float32"),
        (b"ascend910b", b"ascend310p", "dtype bfloat16: ascend310p computes in float16"),
        (b"owner/name", b"name", "model name: owner/name is needed"),
        (b"owner/name", b"owner/../name", "owner/name is needed"),
        (b"tp: 4", b"tp: 4\nrevision: a b", "revision a b: "),
        (b"mem-fraction-static", b"tp-size", "serve.tp-size: is given by tp"),
        (b"mem-fraction-static", b"--mem", "serve.--mem: a flag's name without its dashes"),
        (b"0.9", b"[0.9]", "serve[...]: expected bool | int | float | str, got array"),
        (b"2026-01-31", b"yesterday", "verified_on[0].when: invalid RFC3339"),
        (b"2026-01-31", b"2026-02-31", "day is out of range"),
        (b"what: convert, ", b"", "verified_on[0].what: is missing"),
        (GOOD, b"", "a mapping of keys to values"),
        (GOOD, b"- 1", "a mapping of keys to values"),
        (GOOD, b"tp: [", "line 1: "),
        (GOOD, b"a: &a 1\nb: *a", "line 2: aliases are not used"),
        (GOOD, b"<<: {tp: 4}", "line 1: a key must be a word"),
        (GOOD, b"1: 2", "line 1: a key must be a word"),
        (GOOD, b"tp: !!python/name:os.system", "could not determine a constructor"),
        (GOOD, b"\xff\xfe\x00", "not YAML"),
        (GOOD, b"[" * 20_000, "recursion"),
        (GOOD, b"tp: " + b"9" * 6000, "digits"),
    ],
    ids=lambda v: v.decode("latin1")[:24] if isinstance(v, bytes) else "",
)
def test_what_is_wrong_is_named_with_its_place(old: bytes, new: bytes, said: str) -> None:
    with pytest.raises(RecipeError) as e:
        parse(GOOD.replace(old, new))
    assert said in e.value.message
    assert e.value.message.startswith("mine.yaml")
    assert "msconv recipes" in e.value.hint


@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
def test_damaged_recipes_are_refused_or_read(piece: bytes, place: int) -> None:
    try:
        found = parse(GOOD[:place] + piece + GOOD[place + len(piece) :])
    except RecipeError as e:
        assert e.message.startswith("mine.yaml")
    else:
        assert found.devices.count == found.tp


# Finding


def test_a_recipe_of_the_users_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Qwen3-8B", "mine"):
        (tmp_path / f"{name}.yaml").write_bytes(GOOD)
    assert find_recipe("mine") is None
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    for name in ("Qwen3-8B", "mine"):
        found = find_recipe(name)
        assert found
        assert (found.model, found.path) == ("owner/name", str(tmp_path / f"{name}.yaml"))
    assert len(all_recipes()) == len(SHIPPED) + 1


def test_a_directory_of_recipes_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY, "/nowhere")
    with pytest.raises(UsageError, match="MSCONV_RECIPES=/nowhere: no such directory"):
        all_recipes()


def test_a_recipe_can_be_a_file_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(GOOD)
    found = find_recipe(str(tmp_path / "mine.yaml"))
    assert found
    assert found.name == "mine"


@pytest.mark.parametrize("name", ["none.yaml", ".", "a\0b.yaml", "x" * 300 + ".yaml"])
def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory.yaml").mkdir()
    path = tmp_path / ("directory.yaml" if name == "." else name)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(path)


def test_a_file_too_large_for_a_recipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(GOOD + b"#" * MAX_BYTES)
    with pytest.raises(RecipeError, match=f"more than {MAX_BYTES} bytes"):
        read_recipe(path)


@pytest.mark.parametrize("name", ["../Qwen3-8B", "Qwen3-8B/", "", ".", "Qwen3-8B\n"])
def test_no_other_spelling_is_a_recipe(name: str) -> None:
    assert find_recipe(name) is None


def test_near_names_are_suggested() -> None:
    assert near_names("qwen3-8b")[0] == "Qwen3-8B"
    assert "DeepSeek-V3" in near_names("deepseek-v3-0324")
    assert near_names("gpt2") == []


def test_names_are_in_the_order_of_sizes() -> None:
    plain = [n for n in SHIPPED if n in {m.partition("/")[2] for m in MODELS} and n.startswith("Qwen3")]
    plain = [n for n in plain if not n.endswith(("-2507", "-Instruct"))]
    assert plain == [f"Qwen3-{s}" for s in ("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B", "32B", "235B-A22B")]

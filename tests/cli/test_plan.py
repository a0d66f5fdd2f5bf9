"""`msconv plan`: numbers that are known from elsewhere, from headers alone, and ceilings that are kept."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from msconv_runtime.dtypes import DTYPES
from tests.commands import Result, run_msconv
from tests.synthetic import qwen3_config, qwen3_shapes, write_synthetic

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
BILLIONS = {  # as published with the models
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.721,
    "Qwen3-4B": 4.022,
    "Qwen3-8B": 8.191,
    "Qwen3-14B": 14.768,
    "Qwen3-32B": 32.762,
}
LAYOUTS = (1, 2, 4, 8)


@cache
def config_of(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`configured/<name>`: config.json alone.  `stored/<name>`: whole checkpoints, all zeros that take no room."""
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate(BILLIONS):
        (root / "configured" / name).mkdir(parents=True)
        (root / "configured" / name / "config.json").write_text(json.dumps(config_of(name)))
        write_synthetic(root / "stored" / name, config_of(name), shards=1 + 3 * i, sparse=True)
    return root


def plan(model: Path, tp: int, *options: object, cwd: Path | None = None) -> Result:
    done = run_msconv("plan", "--model", model, "--tp", tp, "--json", *options, cwd=cwd)
    assert "Traceback" not in done.stderr
    return done


def rank_tensor_bytes(config: dict[str, Any], tp: int) -> int:
    """What one rank holds, counted tensor by tensor as Megatron's layout has it."""
    total = 0
    for name, shape in qwen3_shapes(config).items():
        size = math.prod(shape)
        if name.endswith(("norm.weight", "o_proj.bias")):
            part = size
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            part = math.ceil(shape[0] / tp) * shape[1]
        elif ".k_proj." in name or ".v_proj." in name:
            part = size // min(tp, config["num_key_value_heads"])
        else:
            part = size // tp
        total += 2 * part
    return total + (4 + 4 * tp if tp > 1 else 0)  # where a rank's vocabulary begins, and which rank it is


def check_rank_bytes(weight_bytes: int, config: dict[str, Any], tp: int) -> None:
    """Tensors and headers: 64 bytes aligned, and no more than names, shapes and places need."""
    headers = weight_bytes - rank_tensor_bytes(config, tp)
    assert 0 < headers < 200 * len(qwen3_shapes(config))
    assert headers % 64 == 0


@pytest.mark.parametrize(("kind", "tp"), [*(("configured", tp) for tp in LAYOUTS), ("stored", 1), ("stored", 8)])
@pytest.mark.parametrize("name", BILLIONS)
def test_a_published_model_is_planned_to_the_byte(
    models: Path, tmp_path: Path, name: str, tp: int, kind: str
) -> None:
    done = plan(models / kind / name, tp, "--jobs", 2, cwd=tmp_path)
    assert done.code == 0, done.stderr
    found, config = done.json, config_of(name)
    elements = sum(math.prod(shape) for shape in qwen3_shapes(config).values())
    assert found["parameters"] == elements
    assert round(found["parameters"] / 1e9, 3) == BILLIONS[name]
    assert (found["model"], found["family"], found["dtype"]) == (name, "qwen3", "bfloat16")
    assert found["source_bytes"] == 2 * elements
    assert found["download_bytes"] == (2 * elements if kind == "configured" else 0)
    assert len(found["ranks"]) == tp
    for rank in found["ranks"]:
        check_rank_bytes(rank["weight_bytes"], config, tp)
    assert found["output_bytes"] == sum(rank["weight_bytes"] for rank in found["ranks"])
    assert 96 << 20 < found["peak_memory_bytes"] <= 256 << 20
    assert found["seconds"] > 0
    assert found["smallest_tp"] is None
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-32B"])
def test_a_plan_does_not_depend_on_where_the_shapes_come_from(models: Path, tmp_path: Path, name: str) -> None:
    configured, stored = (plan(models / kind / name, 4, cwd=tmp_path).json for kind in ("configured", "stored"))
    for key in ("parameters", "ranks", "output_bytes", "source_bytes", "dtype"):
        assert configured[key] == stored[key]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_element_type_has_other_sizes(models: Path, tmp_path: Path, dtype: str) -> None:
    name = "Qwen3-0.6B"
    found = plan(models / "stored" / name, 1, "--dtype", dtype, cwd=tmp_path).json
    headers = found["output_bytes"] - found["parameters"] * DTYPES[dtype].nbytes
    assert found["dtype"] == dtype
    assert 0 < headers < 200 * len(qwen3_shapes(config_of(name)))
    assert found["source_bytes"] == 2 * found["parameters"]


@pytest.mark.parametrize(("tp", "context", "batch"), [(1, 4096, 1), (4, 32768, 3), (16, 1000, 8)])
@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-32B"])
def test_a_device_holds_weights_and_the_cache_of_every_sequence(
    models: Path, tmp_path: Path, name: str, tp: int, context: int, batch: int
) -> None:
    config = config_of(name)
    options = ("--context", context, "--batch", batch)
    (rank, *_) = plan(models / "configured" / name, tp, *options, cwd=tmp_path).json["ranks"]
    heads = max(1, config["num_key_value_heads"] // tp)
    per_token = config["num_hidden_layers"] * 2 * heads * config["head_dim"] * 2
    assert rank["kv_bytes_per_token"] == per_token
    assert rank["kv_bytes"] == per_token * context * batch
    assert rank["device_bytes"] == rank["weight_bytes"] + rank["kv_bytes"]


@pytest.mark.parametrize(
    ("name", "gib", "context"),
    [
        ("Qwen3-0.6B", 1, 1024),
        ("Qwen3-0.6B", 2, 1024),
        ("Qwen3-8B", 16, 4096),
        ("Qwen3-8B", 64, 4096),
        ("Qwen3-14B", 32, 40960),
        ("Qwen3-32B", 64, 4096),
        ("Qwen3-32B", 32, 40960),
        ("Qwen3-32B", 2, 4096),
    ],
)
def test_the_smallest_tp_is_the_first_that_fits_with_a_tenth_kept_free(
    models: Path, tmp_path: Path, name: str, gib: int, context: int
) -> None:
    options = ("--device-memory", f"{gib}G", "--context", context)
    found = plan(models / "configured" / name, 1, *options, cwd=tmp_path).json
    config = config_of(name)
    needed = {}
    for tp in (1, 2, 4, 8, 16, 32):
        if config["num_attention_heads"] % tp == 0:
            heads = max(1, config["num_key_value_heads"] // tp)
            cache_bytes = config["num_hidden_layers"] * 2 * heads * config["head_dim"] * 2 * context
            needed[tp] = rank_tensor_bytes(config, tp) + cache_bytes
    fitting = [tp for tp, size in needed.items() if size <= 0.9 * gib * 2**30]
    assert found["smallest_tp"] == (fitting[0] if fitting else None)


def test_a_plan_in_words_has_the_same_numbers(models: Path, tmp_path: Path) -> None:
    done = run_msconv(
        *("plan", "--model", models / "configured" / "Qwen3-32B", "--tp", 2, "--device-memory", "64G"),
        cwd=tmp_path,
    )
    assert done.code == 0
    assert "32.762 billion parameters" in done.stdout
    assert "config.json" in done.stdout
    assert "smallest tp that fits: 2" in done.stdout
    assert "msconv convert" in done.stderr


@pytest.mark.parametrize("tp", [3, 64])
def test_ranks_that_do_not_divide_are_refused_with_those_that_do(models: Path, tmp_path: Path, tp: int) -> None:
    done = plan(models / "configured" / "Qwen3-8B", tp, cwd=tmp_path)
    assert done.code == 1
    assert done.json["error"]["code"] == "plan"
    assert "Try --tp 1, 2, 4, 8, 16 or 32" in done.json["error"]["hint"]


def test_half_a_download_is_not_planned_as_if_it_were_whole(models: Path, tmp_path: Path) -> None:
    model = tmp_path / "half"
    write_synthetic(model, config_of("Qwen3-4B"), shards=3, sparse=True)
    (model / "model-00002-of-00003.safetensors").unlink()
    done = plan(model, 2, cwd=tmp_path)
    assert done.code == 1
    assert "model-00002-of-00003.safetensors" in done.json["error"]["message"]


# Memory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB in layers as wide as Qwen3-1.7B's."""
    config = qwen3_config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=4096,
    )
    model = write_synthetic(tmp_path_factory.mktemp("wide") / "wide", config, shards=2)
    assert sum(p.stat().st_size for p in model.iterdir()) > 200_000_000
    return model


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize(("ceiling", "jobs"), [("1M", 1), ("64M", 2), ("100M", 16)])
def test_too_small_a_ceiling_is_refused_up_front_with_what_is_needed(
    wide: Path, tmp_path: Path, command: str, ceiling: str, jobs: int
) -> None:
    options = ("--model", wide, "--tp", 4, "--output", tmp_path / "out", "--jobs", jobs, "--json")
    done = run_msconv(command, *options, "--max-memory", ceiling)
    assert done.code == 5
    assert done.json["error"]["code"] == "resource"
    assert not (tmp_path / "out").exists()
    found = re.search(r"needs at least ([\d,]+) ", done.json["error"]["message"])
    assert found
    needed = int(found[1].replace(",", ""))
    hint = re.search(r"--max-memory (\d+)M", done.json["error"]["hint"])
    assert hint
    assert needed <= int(hint[1]) << 20 < needed + (2 << 20)
    again = run_msconv("plan", *options, "--max-memory", f"{hint[1]}M")
    assert again.code == 0, again.stderr
    assert again.json["peak_memory_bytes"] <= int(hint[1]) << 20


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("ceiling", [112, 128, 192])
def test_a_ceiling_on_memory_is_kept(wide: Path, tmp_path: Path, ceiling: int, jobs: int) -> None:
    options = ("--model", wide, "--tp", 4, "--jobs", jobs, "--max-memory", f"{ceiling}M", "--json")
    planned = run_msconv("plan", *options, cwd=tmp_path)
    assert planned.code == 0, planned.stderr
    done = run_msconv("convert", *options, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert done.json["peak_rss_bytes"] <= planned.json["peak_memory_bytes"] <= ceiling << 20


def test_a_cast_keeps_its_ceiling_too(wide: Path, tmp_path: Path) -> None:
    options = ("--model", wide, "--tp", 2, "--dtype", "float32", "--jobs", 2, "--max-memory", "128M", "--json")
    done = run_msconv("convert", *options, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert done.json["peak_rss_bytes"] <= 128 << 20


def test_without_a_ceiling_the_plan_is_one(wide: Path, tmp_path: Path) -> None:
    options = ("--model", wide, "--tp", 8, "--jobs", 2, "--json")
    planned = run_msconv("plan", *options, cwd=tmp_path).json["peak_memory_bytes"]
    done = run_msconv("convert", *options, "--output", tmp_path / "out")
    assert done.json["peak_rss_bytes"] <= planned

"""What the report says, against manifests whose numbers are known."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msconv.report.data import describe
from msconv.report.groups import group_of
from msconv.workspace.timings import Timing
from msconv_runtime.artifact import File, Manifest
from msconv_runtime.targets import TARGETS
from tests.report.manifests import manifest_of

GIB = 1 << 30


def described(*args: Any, **options: Any) -> dict[str, Any]:
    manifest, config = manifest_of(*args, **options)
    return describe(manifest, config, {})


def groups(target: dict[str, Any]) -> dict[str, int]:
    return {g["group"]: g["bytes"] for g in target["groups"]}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.7.self_attn.qkv_proj.weight", "attention"),
        ("model.layers.7.self_attn.q_norm.weight", "norms"),
        ("model.layers.7.self_attn.kv_a_layernorm.weight", "norms"),
        ("model.layers.7.mlp.experts.down_proj.weight", "experts"),
        ("model.layers.7.mlp.shared_experts.down_proj.weight", "shared experts"),
        ("model.layers.7.mlp.gate.weight", "router"),
        ("model.layers.7.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.7.mlp.gate_up_proj.weight", "dense MLP"),
        ("model.norm.weight", "norms"),
        ("lm_head.weight", "head"),
        ("expert_start", "rank constants"),
        ("something.else", "other"),
    ],
)
def test_every_tensor_has_a_group(name: str, group: str) -> None:
    assert group_of(name) == group


def test_memory_is_that_of_the_targets_element_type() -> None:
    """Qwen3-0.6B on two ranks: 151936 * 1024 values of embedding, half a rank; 8 key/value heads of 128."""
    data = described("Qwen3-0.6B", 2, 1, ("cpu", "ascend910b"))
    cpu, npu = data["memory"]["targets"]
    assert groups(npu)["embedding"] == 151936 * 1024 // 2 * 2
    assert groups(cpu)["embedding"] == 151936 * 1024 // 2 * 4
    assert "head" not in groups(npu)  # tied
    assert npu["kv_bytes_per_token"] == 2 * 28 * 4 * 128 * 2
    assert cpu["kv_bytes_per_token"] == 2 * npu["kv_bytes_per_token"]
    assert data["memory"]["context"] == 4096
    assert groups(npu)["KV cache"] == 4096 * npu["kv_bytes_per_token"]
    assert npu["total_bytes"] == sum(groups(npu).values())
    assert npu["weight_bytes"] == npu["total_bytes"] - npu["kv_bytes"]
    assert sum(g["share"] for g in npu["groups"]) == pytest.approx(1)
    assert not cpu["devices"]


def test_devices_are_those_of_the_target_and_all_if_there_is_none() -> None:
    (target,) = described("Qwen3-0.6B", 1, 1, ("ascend310p",))["memory"]["targets"]
    assert [d["memory_bytes"] for d in target["devices"]] == [42 * GIB]
    _, stored = described("Qwen3-0.6B", 1, 1, ("cpu",))["memory"]["targets"]
    assert stored["target"] == "as stored"
    assert [d["name"] for d in stored["devices"]] == [d.name for t in TARGETS.values() for d in t.devices]
    assert stored["dtype"] == "bfloat16"


def test_what_does_not_fit_is_said_and_what_fits_has_room_for_tokens() -> None:
    small, large = described("Qwen3-32B", 2, 1, ("ascend910b",))["memory"]["targets"][0]["devices"]
    assert (small["memory_bytes"], small["fits"], small["tokens"]) == (32 * GIB, False, 0)
    assert (large["memory_bytes"], large["fits"]) == (64 * GIB, True)
    target = described("Qwen3-32B", 2, 1, ("ascend910b",))["memory"]["targets"][0]
    used = target["weight_bytes"] + large["tokens"] * target["kv_bytes_per_token"]
    assert used <= 0.9 * 64 * GIB < used + target["kv_bytes_per_token"]


def test_experts_stand_by_their_ranks() -> None:
    data = described("DeepSeek-V3", 16, 8)
    assert [r["experts"] for r in data["ranks"][:4]] == ["0..31", "0..31", "32..63", "32..63"]
    assert data["ranks"][-1]["experts"] == "224..255"
    assert {r["shared_by"] for r in data["ranks"]} == {2}
    assert len(data["ranks"]) == 16


def test_many_ranks_are_folded() -> None:
    data = described("DeepSeek-V3", 128, 4)
    assert [(r["ranks"], r["experts"]) for r in data["ranks"]] == [
        ("0..31", "0..63"),
        ("32..63", "64..127"),
        ("64..95", "128..191"),
        ("96..127", "192..255"),
    ]


def test_coverage_is_folded_and_whole() -> None:
    c = described("DeepSeek-V3", 16, 16, ("ascend910c",))["coverage"]
    assert c["missing"] == c["unused"] == []
    assert c["expected"] == c["stored"]
    assert sum(k["tensors"] for k in c["kept"]) == c["stored"]
    kept = {k["name"]: k for k in c["kept"]}
    experts = kept["model.layers.{3..60}.mlp.experts.gate_up_proj.weight"]
    assert (experts["tensors"], experts["shape"]) == (58, "16 × 7168 × 4096")
    assert c["dropped"][0]["reason"].startswith("multi-token")
    (target,) = c["targets"]
    assert target["missing"] == target["unused"] == []
    assert target["not_needed"] == ["rank_onehot"]


def test_what_is_missing_or_unused_is_named() -> None:
    manifest, config = manifest_of("Qwen3-0.6B", 1, 1, ("cpu",))
    assert manifest.weights is not None
    gone = next(t for t in manifest.weights.tensors if "k_norm" in t.name)
    tensors = [t for t in manifest.weights.tensors if t is not gone]
    tensors[-1] = msgspec.structs.replace(tensors[-1], name="strange.weight")
    renamed = manifest.weights.tensors[-1].name
    weights = msgspec.structs.replace(manifest.weights, tensors=tensors)
    c = describe(msgspec.structs.replace(manifest, weights=weights), config, {})["coverage"]
    assert {m["name"] for m in c["missing"]} == {gone.name, renamed}
    assert [m["name"] for m in c["unused"]] == ["strange.weight"]
    assert {m["name"] for m in c["targets"][0]["missing"]} == {gone.name, renamed}
    assert [m["name"] for m in c["targets"][0]["unused"]] == ["strange.weight"]


def test_the_heat_map_puts_each_norm_under_the_tensors_before_it() -> None:
    (v,) = described("Qwen3-0.6B", 2, 1, ("cpu",))["verification"]
    columns = v["heat"]["columns"]
    assert len(columns) == 28
    assert v["heat"]["embedding"]["error"] == 3.5e-8  # input_layernorm of layer 0
    assert columns[4]["attention"]["error"] == 5 * 3.5e-8  # post_attention_layernorm of layer 4
    assert columns[4]["mlp"]["error"] == 6 * 3.5e-8  # input_layernorm of layer 5
    assert columns[27]["mlp"]["error"] == 2.2e-6  # the last norm
    assert [columns[i]["attention"]["level"] for i in (0, 27)] == [1, 2]
    assert columns[27]["mlp"]["level"] == 3


def test_layers_beyond_a_hundred_share_columns_that_show_the_larger_error() -> None:
    manifest, config = manifest_of("Qwen3-0.6B", 2, 1, ("cpu",))
    config = replace(config, layers=300)
    norms = {f"model.layers.{i}.post_attention_layernorm": 1e-7 * i for i in range(300)}
    norms |= {f"model.layers.{i}.input_layernorm": 0.0 for i in range(300) if i != 8} | {"model.norm": 0.0}
    proof = msgspec.structs.replace(manifest.verified[0], norms=norms)
    heat = describe(msgspec.structs.replace(manifest, verified=[proof]), config, {})["verification"][0]["heat"]
    assert [c["layers"] for c in heat["columns"]][:2] == ["0..3", "4..7"]
    assert len(heat["columns"]) == 75
    assert heat["columns"][1]["attention"]["error"] == pytest.approx(7e-7)
    assert heat["columns"][1]["mlp"] is None  # one of the four was not measured
    assert heat["columns"][2]["mlp"]["error"] == 0.0


def test_without_a_proof_nothing_has_a_number() -> None:
    data = described("Qwen3-0.6B", 2, 1, ("cpu",), proven=False)
    assert data["verdict"]["state"] == "unproven"
    (v,) = data["verification"]
    assert set(v) == {"target", "state", "why", "heat"}
    assert v["heat"]["measured"] == 0
    assert [(c["layers"], c["attention"], c["mlp"]) for c in v["heat"]["columns"]] == [("0..27", None, None)]


def test_a_proof_of_other_bytes_is_none_and_is_said() -> None:
    manifest, config = manifest_of("Qwen3-0.6B", 2, 1, ("cpu", "ascend910b"))
    changed = msgspec.structs.replace(manifest.graphs[0], digest="xxh3:0")
    verdict = describe(msgspec.structs.replace(manifest, graphs=[changed, *manifest.graphs[1:]]), config, {})[
        "verdict"
    ]
    assert verdict["state"] == "partly proven"
    assert (verdict["proven"], verdict["unproven"]) == (["ascend910b"], ["cpu"])
    assert "earlier proof for cpu does not hold" in verdict["meaning"]


def test_graphs_without_weights_and_weights_without_graphs() -> None:
    graphs = described("Qwen3-0.6B", 2, 1, ("ascend910b",), weights=False)
    assert graphs["verdict"]["state"] == "no weights"
    assert graphs["weights"] is None
    assert graphs["memory"]["targets"][0]["weight_bytes"] > 0
    assert graphs["coverage"]["missing"] == []
    assert graphs["commands"][0]["line"].startswith("msconv compile --model Qwen3-0.6B --tp 2 --target ascend910b")
    weights = described("Qwen3-0.6B", 2, 1)
    assert weights["verdict"]["state"] == "no graphs"
    assert weights["verification"] == weights["graphs"] == []
    assert weights["memory"]["targets"][0]["target"] == "as stored"


def test_commands_are_quoted_and_name_the_commit() -> None:
    manifest, config = manifest_of("Qwen3-0.6B", 2, 1, ("cpu",))
    model = msgspec.structs.replace(manifest.model, source="Qwen/Qwen 3;rm", commit="abc123")
    commands = describe(msgspec.structs.replace(manifest, model=model), config, {})["commands"]
    convert = shlex.split(commands[0]["line"])
    assert convert[:4] == ["msconv", "convert", "--model", "Qwen/Qwen 3;rm@abc123"]
    assert convert[4:8] == ["--tp", "2", "--dtype", "bfloat16"]
    assert convert[-1] == "artifacts/Qwen 3;rm-tp2"
    assert [c["what"] for c in commands] == ["convert", "compile", "verify cpu", "check every byte"]


def test_what_makes_the_same_bytes_again_says_what_was_asked_for() -> None:
    manifest, config = manifest_of("Qwen3-0.6B", 2, 1, ("cpu",), quant="w8a8")
    model = msgspec.structs.replace(manifest.model, harmless=["my_note", "rope_scaling.comment"])
    made = describe(msgspec.structs.replace(manifest, model=model), config, {})["commands"][0]["line"]
    assert " --quant w8a8 --harmless my_note --harmless rope_scaling.comment --output " in made
    assert manifest.weights
    read = msgspec.structs.replace(manifest.weights, made="")  # the source had codes already
    assert (
        "--quant"
        not in describe(msgspec.structs.replace(manifest, weights=read), config, {})["commands"][0]["line"]
    )


def test_without_a_tokenizer_the_servers_command_says_so() -> None:
    manifest, config = manifest_of("Qwen3-0.6B", 1, 1, ("cpu",))
    for names, ids in ((["config.json"], True), (["config.json", "tokenizer.json"], False), ([], False)):
        files = [File(name, 1, "xxh3:0") for name in names]
        use = describe(msgspec.structs.replace(manifest, files=files), config, {})["use"]
        (serve,) = [u["line"] for u in use if u["line"].startswith("msconv serve")]
        assert serve.endswith(" -- --skip-tokenizer-init") == ids


def test_compile_time_is_that_of_these_very_graphs() -> None:
    manifest, config = manifest_of("Qwen3-0.6B", 2, 1, ("cpu",))
    prefill, decode = manifest.graphs
    timings = {prefill.path: Timing(prefill.digest, 12.5), decode.path: Timing("xxh3:0", 9.0)}
    (g,) = describe(manifest, config, timings)["graphs"]
    assert [p["compile_seconds"] for p in g["phases"]] == [12.5, None]


@pytest.mark.slow
def test_the_real_artifact_says_what_verify_and_the_manifest_say(proven: Path) -> None:
    from msconv.report.page import facts

    data = facts(proven)
    manifest = msgspec.json.decode((proven / "msconv.json").read_bytes(), type=Manifest)
    assert data["verdict"]["state"] == "proven"
    assert [v["target"] for v in data["verification"]] == ["ascend910b", "cpu"]
    for v, proof in zip(data["verification"], manifest.verified, strict=True):
        assert v["max_abs_logit_error"] == proof.max_abs_logit_error
        assert v["heat"]["measured"] == len(proof.norms) == 2 * 4 + 1
        cells = [c[k]["error"] for c in v["heat"]["columns"] for k in ("attention", "mlp")]
        assert sorted([*cells, v["heat"]["embedding"]["error"]]) == sorted(proof.norms.values())
        assert 0 < max(cells) < proof.bound
    for g in data["graphs"]:
        for i, phase in enumerate(g["phases"]):
            assert sum(k["nodes"][i] for k in g["kinds"]) == phase["nodes"]
            assert phase["compile_seconds"] > 0
    assert {"AllReduce", "GroupedMatmulV4"} <= {k["kind"] for k in data["graphs"][0]["kinds"]}
    assert [r["experts"] for r in data["ranks"]] == ["0..7", "8..15"]
    assert json.loads(json.dumps(data)) == data


def test_the_report_begins_with_what_can_be_done() -> None:
    data = describe(*manifest_of("Qwen3-8B", 4, 1, ("ascend910b", "cpu")), {})
    lines = [(u["target"], u["line"].split()[1]) for u in data["use"]]
    assert lines == [("ascend910b", "rehearse"), ("ascend910b", "serve"), ("cpu", "serve"), ("", "doctor")]
    assert all("artifacts/Qwen3-8B-tp4" in u["line"] for u in data["use"])
    unproven = describe(*manifest_of("Qwen3-8B", 4, 1, ("cpu",), proven=False), {})
    assert unproven["use"][0]["line"] == "msconv verify artifacts/Qwen3-8B-tp4 --target cpu"
    assert data["verdict"]["standings"][0]["target"] == "ascend910b"
    assert "run on a device: never" in data["verdict"]["standings"][0]["words"]


def test_cuts_are_those_of_the_family() -> None:
    data = describe(*manifest_of("DeepSeek-V3", 16, 4, ("ascend910b",)), {})
    cuts = {c["name"].rpartition("}")[2] or c["name"]: c for c in data["cutting"]}
    assert len(data["cutting"]) > 15
    experts = cuts[".mlp.experts.gate_up_proj.weight"]
    assert (experts["axis"], experts["pieces"]) == ("rows", 4)
    assert "each over the ranks that share it" in experts["words"]
    assert (cuts[".mlp.down_proj.weight"]["axis"], cuts[".mlp.down_proj.weight"]["pieces"]) == ("columns", 16)
    assert cuts[".self_attn.o_proj.weight"]["words"] == "by whole heads"
    assert cuts[".mlp.gate.weight"]["words"] == "the same on every rank"
    one = describe(*manifest_of("Qwen3-8B", 1, 1, ("cpu",)), {})
    assert {c["pieces"] for c in one["cutting"]} == {1}


def test_only_what_is_there_is_drawn() -> None:
    for weights in (True, False):  # biases that quantisation gives norms are in the table, and not in this model
        names = [c["name"] for c in described("Qwen3-8B", 2, 1, ("cpu",), weights=weights)["cutting"]]
        assert "model.layers.{0..35}.input_layernorm.weight" in names
        assert not [name for name in names if name.endswith("layernorm.bias")]


def test_loads_are_those_that_plan_would_say() -> None:
    data = describe(*manifest_of("Qwen3-8B", 4, 1, ("ascend910b",)), {})
    (target,) = data["memory"]["targets"]
    loads = {(load["requests"], load["context"]): load for load in target["loads"]}
    assert set(loads) == {(n, c) for n in (1, 8, 32) for c in (4096, 32768)}
    assert loads[1, 4096]["total_bytes"] == target["total_bytes"]
    per_token = target["kv_bytes_per_token"]
    assert loads[32, 32768]["total_bytes"] == target["weight_bytes"] + 32 * 32768 * per_token
    assert loads[1, 4096]["fits"] == ["fits", "fits"]
    assert loads[32, 32768]["fits"] == ["does not fit", "fits"]


# int8


def test_formats_are_told_by_group_and_are_all_of_a_rank() -> None:
    data = described("DeepSeek-V3", 16, 16, ("ascend910b",), quant="w8a8")
    codes, *values = data["weights"]["formats"]
    assert (codes["title"], codes["dtype"]) == ("int8 (W8A8, a scale a token)", "int8")
    assert codes["groups"] == "attention, dense MLP, experts, shared experts"
    assert {v["title"] for v in values} == {"values"}
    assert "router" in " ".join(v["groups"] for v in values)
    assert sum(f["share"] for f in data["weights"]["formats"]) == pytest.approx(1)
    assert data["coverage"]["missing"] == data["coverage"]["unused"] == []
    assert data["coverage"]["expected"] == data["coverage"]["stored"]
    plain = described("DeepSeek-V3", 16, 16, ("ascend910b",))
    assert plain["int8"] == []
    assert [f["title"] for f in plain["weights"]["formats"]] == ["values", "values"]
    half, whole = (sum(f["bytes"] for f in d["weights"]["formats"]) for d in (data, plain))
    assert 0.5 < half / whole < 0.6


def test_led_codes_and_drift_are_those_that_verify_wrote() -> None:
    (proof,) = described("Qwen3-8B", 2, 1, ("ascend910b",), quant="w8a8")["int8"]
    assert proof["codes"] == {"compared": 1_000_000, "led": 37, "share": 3.7e-5, "most": 1e-4, "unexplained": 0}
    assert proof["drift"]["kl"] == 5.1e-4
    assert proof["drift"]["perplexity_unquantised"] == 12.25
    columns = proof["heat"]["columns"]
    assert [c["layers"] for c in columns] == [str(i) for i in range(36)]
    assert columns[1]["mlp"]["error"] == 5e-5
    assert columns[1]["mlp"]["level"] > columns[0]["mlp"]["level"] > columns[2]["attention"]["level"] == 0
    assert described("Qwen3-8B", 2, 1, ("ascend910b",), proven=False, quant="w8a8")["int8"] == []


def test_of_many_layers_neighbours_share_a_column_of_led_codes() -> None:
    from msconv.report.int8 import int8_proof

    manifest, _ = manifest_of("Qwen3-8B", 1, 1, ("cpu",), quant="w8a8")
    proof = int8_proof("cpu", manifest.verified[0], 200)
    assert proof is not None
    assert len(proof["heat"]["columns"]) == 67
    assert proof["heat"]["columns"][0]["mlp"]["error"] == 5e-5
    assert proof["heat"]["columns"][-1]["mlp"] is None

"""`msconv plan --predict`: the conversion's own code is tried, on what is here, and nothing is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msconv.location import LocalDirectory
from msconv.published import published
from msconv.quant.record import LeftOut
from msconv.steps.costs import Cost, Tried
from msconv.steps.estimate import Estimate, estimate
from msconv.steps.predict import LEAST_SCRATCH, ROUND_BYTES, calibrate, sample
from msconv.steps.proof import _reading
from msconv_runtime.errors import ResourceError
from tests.cli.interface import fields
from tests.cli.test_interface import frozen_fields
from tests.commands import run_msconv
from tests.synthetic import qwen3_config

pytestmark = pytest.mark.slow

FEW: dict[str, Any] = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 1}


def test_seconds_are_work_over_speed_and_what_was_not_tried_costs_what_others_of_its_unit_do() -> None:
    read, few = Tried("read", 3e9, 1e9), Tried("rare", 1e9, 0.0)
    products = Tried("a layer", 36, 4.0, "layers")
    cost = Cost(2.0, (read, few, products), 4_000_000_000, 1 << 30)
    assert cost.seconds == pytest.approx(2.0 + 4.0 + 9.0)
    assert (read.seconds, few.seconds, products.seconds) == (3.0, 0.0, 9.0)
    assert Cost(2.0, (), 0, 0).seconds == 2.0


def planned(tmp_path: Path, quant: str | None, predict: bool = False) -> Estimate:
    """Of DeepSeek-V3's true widths, FP8, with two layers and a few experts: config.json alone."""
    root = published("deepseek-ai/DeepSeek-V3")
    assert root is not None
    raw = json.loads((root / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({**raw, **FEW, "topk_group": 1, "vocab_size": 4096}))
    output = tmp_path / "output"
    return estimate(
        LocalDirectory(model), 2, 2, None, output, 2, None, 64, 1, None, quant=quant, drafts=False, predict=predict
    )


@pytest.mark.parametrize("quant", [None, "w8a8"])
def test_each_kind_of_work_is_tried_and_nothing_is_left(tmp_path: Path, quant: str | None) -> None:
    found = planned(tmp_path, quant, predict=True)
    calibration = found.calibration
    assert calibration is not None
    assert found.seconds == calibration.seconds > calibration.startup > 0
    stored = "int8" if quant else "bfloat16"
    kinds = {(t.kind.source, t.kind.stored, t.kind.is_transposed) for t in calibration.tried if t.per_s}
    assert {("float8_e4m3fn", stored, True), ("float8_e4m3fn", stored, False)} <= kinds
    assert sum(t.amount for t in calibration.tried) == pytest.approx(found.plan.read_bytes, rel=0.01)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
    moved = sum(t.amount / t.per_s for t in calibration.tried if t.per_s)
    assert calibration.seconds == pytest.approx(calibration.startup + moved, rel=0.05)


def test_what_was_tried_is_said_with_its_fields(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(qwen3_config(hidden_size=512, intermediate_size=2048)))
    done = run_msconv("plan", tmp_path, "--tp", 2, "--output", tmp_path / "out", "--predict", "--json")
    assert done.code == 0, done.stderr
    assert sorted(fields(done.json)) == sorted(frozen_fields()["msconv plan --predict"])
    assert "Traceback" not in done.stderr


def test_a_proof_that_is_not_predicted_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(qwen3_config()))
    asked = ("plan", tmp_path, "--output", tmp_path / "out", "--predict", "--json")
    done = run_msconv(*asked, "--tp", 1, "--target", "cpu", "--target", "onnx")
    assert done.code == 0, done.stderr
    cpu, onnx = done.json["verify"]
    assert (cpu["target"], onnx["target"]) == ("cpu", "onnx")
    assert cpu["seconds"] is onnx["seconds"] is None
    assert "MindSpore" in cpu["why_not"]
    assert "onnx" in onnx["why_not"]
    assert done.json["download"] is None
    done = run_msconv("plan", tmp_path, "--tp", 1, "--target", "cpu")
    assert done.code == 2
    assert "Add --predict" in done.stderr


def test_a_head_that_is_the_embedding_becomes_float32_as_another_does(tmp_path: Path) -> None:
    values = []
    for tied in (False, True):
        model = tmp_path / str(tied)
        model.mkdir()
        (model / "config.json").write_text(json.dumps(qwen3_config(tie_word_embeddings=tied, vocab_size=24)))
        found = estimate(LocalDirectory(model), 2, 1, None, tmp_path / "out", 2, None, 64, 1, None)
        values.append(next(t.amount for t in _reading(found) if t.kind == "bfloat16 to float32"))
    assert values[0] == values[1]


def test_the_proof_of_a_target_is_tried_and_its_work_is_counted(tmp_path: Path) -> None:
    config = qwen3_config(hidden_size=256, head_dim=64, num_hidden_layers=3, vocab_size=6000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ("plan", tmp_path, "--output", tmp_path / "out", "--predict", "--json", "--target", "ascend910b")
    done = run_msconv(*asked, "--tp", 2)
    assert done.code == 0, done.stderr
    (proof,) = done.json["verify"]
    assert proof["why_not"] is None
    assert proof["read_bytes"] == done.json["source_bytes"] + 2 * done.json["output_bytes"]
    of = {k["kind"]: k for k in proof["kinds"]}
    assert all(k["per_s"] > 0 for k in proof["kinds"])
    layers = {name: k["amount"] for name, k in of.items() if k["unit"] == "layers"}
    assert layers["ascend910b: layers like 0 on 2 ranks"] == 2 * layers["transformers: layers like 0"] >= 2 * 3
    seconds = proof["startup_s"] + sum(k["amount"] / k["per_s"] for k in proof["kinds"])
    assert proof["seconds"] == pytest.approx(seconds, rel=0.1)
    assert proof["peak_memory_bytes"] > 4 * done.json["parameters"]
    assert {f for f in fields(done.json) if f.startswith("verify")} <= frozen_fields()[
        "msconv plan --predict --target"
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_place_without_room_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    there = os.statvfs(tmp_path)
    small = os.statvfs_result((there.f_bsize, there.f_frsize, *[LEAST_SCRATCH // there.f_frsize] * 3, *there[5:]))
    monkeypatch.setattr(os, "statvfs", lambda place: small)
    with pytest.raises(ResourceError, match="too few for a sample"):
        calibrate(planned(tmp_path, None).plan, tmp_path, 1, None, 0.0)


def test_a_kind_of_which_no_unit_can_be_tried_costs_what_others_do(tmp_path: Path) -> None:
    """Tensors of zeros that a checkpoint must have (`weight_offset`) are compared, which a sample is not."""
    found = planned(tmp_path, None)
    names = [n for n, t in found.plan.sources.items() if t.dtype.startswith("float8")]
    zeros = LeftOut(next(iter(found.plan.sources)), "zeros", is_zero=True)
    plan = replace(found.plan, checked=dict.fromkeys(names, (zeros,)))
    tried = calibrate(plan, tmp_path, 1, None, 0.0).tried
    assert {t.per_s for t in tried if t.kind.source.startswith("float8")} == {0.0}
    assert any(t.per_s for t in tried)


def test_a_sample_has_values_of_every_type(tmp_path: Path) -> None:
    """Codes that are no number, or scales that are none, would end the trial."""
    import ml_dtypes
    import numpy as np

    plan = planned(tmp_path, None).plan
    info = next(iter(plan.sources.values()))
    with sample(tmp_path) as (source, _):
        data = bytearray(ROUND_BYTES // 16)
        source.read(info, 0, memoryview(data))
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn):
        values = np.frombuffer(data, dtype).astype(np.float32)
        assert np.isfinite(values).all()
        assert (values > 0).all()

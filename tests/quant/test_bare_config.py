"""The config.json of an artifact whose weights were quantised here: it does not describe those of the source."""

from __future__ import annotations

import json
from pathlib import Path

from msconv.checkpoint.reference import configuration
from msconv.location import LocalDirectory
from msconv.steps.compile import begin_without_weights, compile_graphs
from msconv.verify.int8.reference import QuantisedReference
from msconv_runtime.artifact import Artifact
from tests.conversions import convert
from tests.moe_checkpoints import make_deepseek_v3, quantise_fp8


def test_fp8_that_became_int8_is_no_fp8_to_a_server(tmp_path: Path) -> None:
    model = quantise_fp8(make_deepseek_v3(tmp_path / "plain"), tmp_path / "fp8")
    assert "quantization_config" in json.loads((model / "config.json").read_text())
    begin_without_weights(LocalDirectory(model), 1, 1, tmp_path / "out", "w8a8")
    compile_graphs(tmp_path / "out", "ascend910b", quant="w8a8")
    before = [g.digest for g in Artifact(tmp_path / "out").graphs("ascend910b")]
    convert(model, tmp_path / "out", quant="w8a8")  # completes what had graphs only
    artifact = Artifact(tmp_path / "out")
    assert "quantization_config" not in json.loads(artifact.config_bytes())
    assert [f.name for f in configuration(artifact).formats] == ["w8a8-dynamic"]
    assert [g.digest for g in artifact.graphs("ascend910b")] == before
    QuantisedReference(model, artifact.manifest)  # of this very model
    convert(model, tmp_path / "values")
    assert (tmp_path / "values" / "config.json").read_bytes() == (model / "config.json").read_bytes()

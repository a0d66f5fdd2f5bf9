"""onnxruntime-genai loads an artifact's directory and says what transformers says: `make test-onnx`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.onnx_files.making import FAMILIES, TWO_LAYERS, with_graphs

pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime_genai") is None, reason="needs onnxruntime-genai: `make test-onnx` has it"
)
LENGTH = 48
PROMPTS = ([5], [7, 8, 9], [*range(100, 130)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_tokens_of_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    import onnxruntime_genai as genai
    import torch
    from transformers import AutoModelForCausalLM

    source, root = with_graphs(tmp_path, family, None, dtype=dtype, **TWO_LAYERS[family])
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = genai.Model(str(root))
    for prompt in PROMPTS:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=LENGTH, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        wanted = reference.generate(torch.tensor([prompt]), max_length=LENGTH, do_sample=False)[0].tolist()
        assert [int(t) for t in generator.get_sequence(0)] == wanted


def test_a_model_that_names_no_end_is_loaded(tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    from msconv.steps.compile import compile_graphs
    from tests.checkpoints import edit_json
    from tests.conversions import convert

    source, _ = with_graphs(tmp_path, "qwen3", None, num_hidden_layers=1)
    edit_json(source / "config.json", eos_token_id=None, bos_token_id=None)
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "endless")
    compile_graphs(tmp_path / "endless", "onnx")
    model = genai.Model(str(tmp_path / "endless"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=LENGTH, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([1, 2, 3])
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) == LENGTH

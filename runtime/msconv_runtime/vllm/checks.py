"""What vLLM has been told, against the artifact that it shall serve.  Before a byte of the weights is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..artifact.served import refuse_wrong_files
from ..errors import EnvironmentProblem
from ..serving.settings import Settings
from ..serving.signed import refuse_unsigned_once
from ..targets import target_named
from .arguments import LOAD_FORMAT, OVERRIDES


def open_served(vllm_config: Any) -> Artifact:
    """The artifact of vLLM's configuration.  Raises ArtifactError if its files are not those of its manifest,
    EnvironmentProblem if vLLM was told anything that the graphs cannot follow."""
    root, target = Path(vllm_config.model_config.model), target_named(Settings.read().target)
    refuse_unsigned_once(root)
    artifact = Artifact(root)
    refuse_wrong_files(artifact)
    artifact.graphs(target.name)
    if wrong := [*_other_model(vllm_config, target.dtype), *_other_layout(vllm_config, artifact)]:
        lines = "\n".join(f"  {line}" for line in wrong)
        raise EnvironmentProblem(
            f"{root}: vLLM cannot serve it so:\n{lines}",
            "`msconv serve --engine vllm` gives the right flags, msconv_runtime.vllm.arguments those of Python.",
        )
    return artifact


def _other_model(vllm_config: Any, dtype: str) -> list[str]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    found = {
        "hf_overrides": (model.hf_overrides, OVERRIDES),
        "load_format": (vllm_config.load_config.load_format, LOAD_FORMAT),
        "dtype": (str(model.dtype).removeprefix("torch."), dtype),
        "enforce_eager": (model.enforce_eager, True),
        "kv_cache_dtype": (cache.cache_dtype, "auto"),
        "quantization": (model.quantization, None),
        "LoRA": (vllm_config.lora_config is not None, False),
        "speculative decoding": (vllm_config.speculative_config is not None, False),
        "KV transfer": (vllm_config.kv_transfer_config is not None, False),
        "VLLM_USE_V2_MODEL_RUNNER": (vllm_config.use_v2_model_runner, False),
    }
    return [f"{name} is {is_}, not {wanted}" for name, (is_, wanted) in found.items() if is_ != wanted]


def _other_layout(vllm_config: Any, artifact: Artifact) -> list[str]:
    parallel = vllm_config.parallel_config
    found = {
        "tensor_parallel_size": (parallel.tensor_parallel_size, artifact.tp),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "data_parallel_size": (parallel.data_parallel_size, 1),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, 1),
        "nnodes": (parallel.nnodes, 1),
    }
    return [f"{name} is {is_}, not {wanted}" for name, (is_, wanted) in found.items() if is_ != wanted]

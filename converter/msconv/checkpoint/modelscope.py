"""Checkpoints on ModelScope, downloaded by its own client into its own cache: a directory then."""

from __future__ import annotations

from pathlib import Path

from msconv_runtime.errors import EnvironmentProblem

from ..quant.modelslim import DESCRIPTION
from .directory import AUXILIARY, SINGLE, read_index
from .hub_errors import RESUMES, HubError


def download(name: str, revision: str = "", weights: bool = True) -> Path:
    """The directory with configuration, tokenizer and the shards that the index names; or with the configuration.
    Raises EnvironmentProblem without the client, HubError with what it says."""
    try:
        from modelscope import snapshot_download
    except ImportError as e:
        raise EnvironmentProblem(
            f"--source modelscope needs ModelScope's client ({e}).",
            'Install it: pip install "msconv[modelscope]".',
        ) from None

    def bring(names: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=names))
        except Exception as e:
            raise HubError(f"{name}: ModelScope: {type(e).__name__}: {str(e)[:300]}", RESUMES) from e

    if not weights:
        return bring(["config.json", "generation_config.json", DESCRIPTION])
    root = bring([*AUXILIARY, DESCRIPTION, "*.safetensors.index.json"])
    return bring(sorted(set(read_index(root).values())) or [SINGLE])

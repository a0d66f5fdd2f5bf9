"""What an artifact records of its model, and the files of the model that lie beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from msconv_runtime.artifact import File, Manifest, Model, replace_file
from msconv_runtime.artifact.opened import CONFIG
from msconv_runtime.artifact.served import describe_file

from ..checkpoint.directory import Checkpoint

Publish = Callable[[Path, Manifest], object]  # adds what describes an artifact, before its manifest is written


def model_of(checkpoint: Checkpoint, parameters: int) -> Model:
    """The manifest's model.  Its source files are added when their bytes have been read."""
    return Model(
        family=checkpoint.family.name,
        architecture=checkpoint.family.architecture,
        source=checkpoint.repository or checkpoint.name,
        config_digest=checkpoint.config_digest,
        commit=checkpoint.commit,
        parameters=parameters,
        harmless=sorted(checkpoint.harmless),
    )


def copy_files(paths: Iterable[Path], root: Path, config: bytes = b"") -> list[File]:
    """Copy what a server reads besides weights and graphs, and describe each for the manifest.  `config`: what
    config.json shall be, if it is not copied."""
    files = []
    for path in paths:
        entry, data = describe_file(path, config if path.name == CONFIG else b"")
        replace_file(root / path.name, data)
        files.append(entry)
    return files

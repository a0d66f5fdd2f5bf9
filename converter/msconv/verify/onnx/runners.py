"""Who runs an ONNX graph: its reference implementation in numpy, or onnxruntime.

Both get the bytes that were checked, and no name to open: only weights are read from the artifact's directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import Artifact, Graph, digest_bytes
from msconv_runtime.artifact.files import read_sized
from msconv_runtime.errors import ArtifactError, VerificationFailed
from msconv_runtime.onnx_check import refusal_in

Values = Mapping[str, NDArray[Any]]
Runner = Callable[[Values], dict[str, NDArray[Any]]]
MakeRunner = Callable[[Artifact, Graph], Runner]

ONNXRUNTIME = "onnxruntime"
QUIET = 3  # errors only


def runners() -> dict[str, MakeRunner]:
    """By name, those that are installed: the reference first."""
    found: dict[str, MakeRunner] = {"onnx.reference": reference}
    return found | ({ONNXRUNTIME: onnxruntime} if find_spec(ONNXRUNTIME) else {})


def checked_bytes(artifact: Artifact, graph: Graph) -> bytes:
    """A graph's bytes.  Raises ArtifactError for what is not the manifest's, or is no graph that msconv makes."""
    path = artifact.root / graph.path
    data = read_sized(path, graph.size)
    problem = (
        refusal_in(data, graph, artifact.manifest) if digest_bytes(data) == graph.digest else "digest differs"
    )
    if problem:
        raise ArtifactError(f"{path}: {problem}.", "Compile it again: `msconv compile`.")
    return data


def check(artifact: Artifact, graph: Graph) -> None:
    """ONNX's own check of a file, its shapes and what it points at.  Raises VerificationFailed."""
    import onnx

    path = artifact.root / graph.path
    checked_bytes(artifact, graph)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise VerificationFailed(f"{path}: onnx.checker refuses it: {str(e).strip()[:400]}.") from None


def reference(artifact: Artifact, graph: Graph) -> Runner:
    """In numpy, operator by operator: slow, and as the standard says."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_model
    from onnx.reference import ReferenceEvaluator

    model = onnx.ModelProto.FromString(checked_bytes(artifact, graph))
    load_external_data_for_model(model, str(artifact.root))
    names = [o.name for o in model.graph.output]
    evaluator = ReferenceEvaluator(model)

    def run(values: Values) -> dict[str, NDArray[Any]]:
        with np.errstate(all="ignore"):  # rows that nobody reads
            return dict(zip(names, evaluator.run(None, dict(values)), strict=True))

    return run


def onnxruntime(artifact: Artifact, graph: Graph) -> Runner:
    """On a CPU.  Weights are mapped from the rank's file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    folder = str(Path(artifact.root).absolute())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = ort.InferenceSession(checked_bytes(artifact, graph), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]

    def run(values: Values) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(None, dict(values)), strict=True))

    return run

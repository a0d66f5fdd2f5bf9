"""From files to bound graphs: weights as MindSpore tensors, MindIR checked against the manifest, compiled once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from .artifact import Artifact, Graph, digest_bytes
from .artifact.files import read_sized
from .artifact.integrity import refuse_damage
from .artifact.weights import LoadMode, RankWeights
from .dtypes import DTYPES, is_float
from .errors import ArtifactError
from .kernels import Library
from .mindir_check import check_mindir
from .mindir_check.renaming import renamed
from .targets import TARGETS
from .versions import MINDSPORE, in_series, named

NZ = 29  # CANN's number of the FRACTAL_NZ format


def load_weights(
    artifact: Artifact,
    graphs: list[Graph],
    rank: int,
    mode: LoadMode,
    check: bool,
    loaded: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Tensors by name, in the types that these graphs of one target take.  Zero copy where nothing is cast.
    `loaded`: those of other graphs of the same target, which are taken as they are.

    Sizes are always checked; `check` reads the rank's files first and compares every digest."""
    if check:
        refuse_damage(artifact, rank=rank)
    weights = RankWeights(artifact, rank, mode)
    wanted = {p.name: p for g in graphs for p in g.reads}
    target = TARGETS[graphs[0].target]
    missing = sorted(wanted.keys() - weights.tensors.keys() - loaded.keys())
    stored = [n for n in wanted if n in weights.tensors]
    wrong = [n for n in stored if wanted[n].shape != weights.tensors[n].shape]
    if not target.rounds_weights:
        wrong += [n for n in stored if _rounds(weights.tensors[n].dtype, wanted[n].dtype)]
    if missing or wrong:
        raise ArtifactError(
            f"{artifact.root}: the weights do not fit the {target.name} graphs: "
            f"missing {missing[:5]}, of another shape or type {wrong[:5]}.",
            f"Run `msconv compile {artifact.root} --target {target.name}` again.",
        )
    return {
        n: loaded[n] if n in loaded else tensor(weights.array(n, p.dtype)[0], p.dtype) for n, p in wanted.items()
    }


def tensor(array: NDArray[Any], dtype: str) -> Any:
    """A MindSpore tensor over the same memory.  bfloat16 comes as its bits."""
    from mindspore import Tensor
    from mindspore.common.np_dtype import bfloat16

    return Tensor.from_numpy(array.view(bfloat16) if dtype == "bfloat16" else array)


def _rounds(stored: str, wanted: str) -> bool:
    return stored != wanted and wanted != "float32" and is_float(stored) and is_float(wanted)


def element_type(dtype: str) -> Any:
    """MindSpore's type of this name.  Raises ArtifactError for a name that no graph may have."""
    import mindspore

    if dtype not in DTYPES or not DTYPES[dtype].storable:
        raise ArtifactError(f"a graph takes elements of type {dtype[:40]}, which is not known.")
    return getattr(mindspore, DTYPES[dtype].mindspore)


def as_nz(matrix: Any) -> Any:
    """A matrix in the NZ format, on the device: what a 310P multiplies fastest.  Has not run on a device."""
    from mindspore.ops.auto_generate import format_cast

    return format_cast(matrix, NZ)


def check_version(path: Path, graph: Graph) -> None:
    """Raises ArtifactError if the graph is from a MindSpore that was never tried with this code."""
    if not in_series(graph.mindspore, MINDSPORE):
        raise ArtifactError(
            f"{path}: was compiled with mindspore {graph.mindspore}; tested are {named(MINDSPORE, ', ')}.",
            f"Run `msconv compile` again with one of them (target {graph.target}).",
        )


def _load(data: bytes, kernels: Library, groups: Mapping[str, str]) -> Any:
    """MindSpore's graph of bytes that were checked.  Where it names compiled kernels, those of this machine take
    their place, and groups get the names that they have here.

    What MindSpore reads is a copy in a directory of this user alone: nobody can change it after the check, and
    there is no other file beside it."""
    import mindspore as ms

    if kernels.path is not None or groups:
        data = _with_names_of_here(data, kernels, groups)
    with tempfile.TemporaryDirectory(prefix="msconv-") as private:
        copy = Path(private, "graph.mindir")
        copy.write_bytes(data)
        return ms.load(str(copy))


def _with_names_of_here(data: bytes, kernels: Library, groups: Mapping[str, str]) -> bytes:
    def name_here(kind: str, attribute: str, text: str) -> str:
        if attribute == "group":
            return groups.get(text, text)
        if kind == "Custom" and attribute == "func_name" and kernels.path is not None:
            _, _, function = text.partition(":")
            return f"{kernels.path}:{function}"
        return text

    return renamed(data, name_here)


def run_again(cell: Any, inputs: Sequence[Any]) -> Any:
    """What a cell gives that has run before, with inputs of the same types and, but for what is dynamic, shapes.
    MindSpore's checks of them, at each call of a cell, took 2.4 ms of the processor's time for 28 layers."""
    from mindspore.nn.cell import _cell_graph_executor

    phase = getattr(cell, "compile_phase", "")
    return _cell_graph_executor._exec_pip(cell, *inputs, phase=phase) if phase else cell(*inputs)


def compile_only(cell: Any, inputs: Sequence[Any]) -> None:
    """What calling a GraphCell does before it runs.  For `run_again`."""
    cell.phase = "graph_load_from_mindir"
    cell._add_attr(cell.phase, cell.graph)
    cell.compile(*inputs)


def bind(
    artifact: Artifact,
    graph: Graph,
    tensors: dict[str, Any],
    kernels: Library,
    groups: Mapping[str, str],
    is_dynamic: bool = True,
) -> Any:
    """A GraphCell with its weights, compiled once for all shapes; without `is_dynamic` for those of its first
    call."""
    from mindspore import Tensor, nn

    root = artifact.root
    path = root / graph.path
    check_version(path, graph)
    data = read_sized(path, graph.size)
    if digest_bytes(data) != graph.digest:
        raise ArtifactError(
            f"{path}: was altered: its digest is not the manifest's.",
            f"Run `msconv compile {root} --target {graph.target}` again.",
        )
    check_mindir(path, data, graph, artifact.tp)
    cell = nn.GraphCell(_load(data, kernels, groups))
    wanted = {p.name: p for p in graph.reads}
    if set(cell._params) != set(wanted):
        odd = sorted(set(cell._params) ^ set(wanted))
        raise ArtifactError(f"{path}: its parameters are not the manifest's: {odd[:5]}.")
    for name, param in cell._params.items():
        if list(param.shape) != wanted[name].shape:
            raise ArtifactError(f"{path}: {name} has shape {list(param.shape)}, not {wanted[name].shape}.")
        param.assign_value(as_nz(tensors[name]) if name in graph.nz else tensors[name])
    if is_dynamic:  # else every new block-table width compiles again
        cell.set_inputs(*(Tensor(shape=list(i.shape), dtype=element_type(i.dtype)) for i in graph.inputs))
    return cell

"""MindIR files to running graphs: checked against the manifest, weights bound, warmed up."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .artifact import Graph, GraphInput, Manifest, Phase, digest_bytes
from .errors import ArtifactError, EnvironmentProblem
from .integrity import check_artifact
from .native import LIBRARY, Library, library, use_threads
from .paging import Batch, Sequences, attention_mask
from .weights import LoadMode, RankWeights, check_size

TESTED_MINDSPORE = ("2.8.", "2.10.")  # graphs of 2.8.0 and 2.10.0 load in each other
FREE_PAGE = 16
FEW = 2  # sequences; measured at the shape of Qwen3-0.6B
NO_KERNELS = Library(None, "the artifact has no native graph, or it was not asked for")
NZ = 29  # CANN's number of the FRACTAL_NZ format
RAGGED_TOKENS = 2048  # in one call of the native graph
CHUNK_TOKENS = 512  # places (sequences x longest) in one prefill call: bounds its memory


def load_weights(
    root: Path, manifest: Manifest, graphs: list[Graph], rank: int, mode: LoadMode, check: bool
) -> dict[str, Any]:
    """Tensors by name, in the types that these graphs of one target take.  Zero copy where nothing is cast.

    Sizes are always checked; `check` reads the rank's files first and compares every digest."""
    if check and (damage := check_artifact(root, manifest, rank=rank)):
        places = "\n".join(f"  {d.path}: {d.tensor or 'file'}: {d.problem}" for d in damage[:20])
        raise ArtifactError(
            f"{root}: its bytes are not those the manifest describes:\n{places}",
            "Copy the artifact again, or convert again with --force.",
        )
    weights = RankWeights(root, manifest, rank, mode)
    wanted = {p.name: p for g in graphs for p in g.parameters}
    target = graphs[0].target
    missing = sorted(wanted.keys() - weights.tensors.keys())
    wrong = [n for n in wanted if n not in missing and wanted[n].shape != weights.tensors[n].shape]
    if target == "cpu":  # rounding is for NPUs, which compute in half precision
        wrong += [n for n in wanted if n not in missing and _rounds(weights.tensors[n].dtype, wanted[n].dtype)]
    if missing or wrong:
        raise ArtifactError(
            f"{root}: the weights do not fit the {target} graphs: "
            f"missing {missing[:5]}, of another shape or type {wrong[:5]}.",
            f"Run `msconv compile {root} --target {target}` again.",
        )
    return {n: tensor(weights.array(n, p.dtype)[0], p.dtype) for n, p in wanted.items()}


def tensor(array: NDArray[Any], dtype: str) -> Any:
    """A MindSpore tensor over the same memory.  bfloat16 comes as its bits."""
    from mindspore import Tensor
    from mindspore.common.np_dtype import bfloat16

    return Tensor.from_numpy(array.view(bfloat16) if dtype == "bfloat16" else array)


def graphs_of(root: Path, manifest: Manifest, target: str) -> list[Graph]:
    """Raises ArtifactError unless prefill and decode are compiled for the target."""
    graphs = manifest.graphs_for(target)
    if not {"prefill", "decode"} <= {g.phase for g in graphs}:
        have = sorted({g.target for g in manifest.graphs})
        raise ArtifactError(
            f"{root}: has no graphs for {target}" + (f" (only for {', '.join(have)})." if have else "."),
            f"Run `msconv compile {root} --target {target}`.",
        )
    return graphs


def _rounds(stored: str, wanted: str) -> bool:
    return stored != wanted and wanted != "float32" and "int32" not in (stored, wanted)


class Graphs:
    """The graphs of one rank, sharing one set of weights: the native one alone, where this machine has compiled
    kernels and `native` allows it, else prefill and decode."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        target: str,
        rank: int = 0,
        mode: LoadMode = "mmap",
        check: bool = False,
        native: bool = True,
        ranks_here: int = 0,
        page: int = FREE_PAGE,
        groups: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`ranks_here`: how many share this machine's processors, 0 for all of the artifact's.  `page`: slots a
        page of the caches, where the graphs leave it free.  `groups`: other names for the groups that the graphs
        name, those under which MindSpore knows them here."""
        self.manifest, self.target = manifest, target
        self._free_page = page
        entries = {g.phase: g for g in graphs_of(root, manifest, target)}
        self.library = library() if native and "native" in entries else NO_KERNELS
        self.native = self.library.path is not None
        if self.native:
            use_threads(ranks_here or manifest.parallel.tp)
        self.entries = {phase: g for phase, g in entries.items() if (phase == "native") is self.native}
        # Of MindSpore's own operations the decode graph multiplies the other way round: the prefill graph is
        # faster for few sequences, unless the graphs differ in their experts or in latent attention.
        names = [p.name for p in entries["decode"].parameters]
        unlike = any(".experts." in n or ".kv_a_proj" in n for n in names)
        self._prefill_decodes_few = target == "cpu" and not unlike
        self._compiles_at_ready = 0
        started = time.monotonic()
        self.tensors = load_weights(root, manifest, list(self.entries.values()), rank, mode, check)
        loaded = time.monotonic()
        self.cells = {
            phase: _bind(root, g, self.tensors, self.library, groups) for phase, g in self.entries.items()
        }
        self.seconds = {mode: loaded - started, "bind": time.monotonic() - loaded}

    @property
    def cache_shape(self) -> list[int | None]:
        """[pages, page, K, D] with None for what is free."""
        return self._inputs[-1].shape

    @property
    def _inputs(self) -> list[GraphInput]:
        return next(iter(self.entries.values())).inputs

    @property
    def page(self) -> int:
        """Slots a page of the caches: the graphs', or what was given where they leave it free."""
        return self.cache_shape[1] or self._free_page

    @property
    def num_caches(self) -> int:
        """Cache inputs of a graph: two a layer, or one where both come from the same latent."""
        return sum("_cache." in i.name for i in self._inputs)

    def decode(self, batch: Batch, caches: Sequence[Any]) -> NDArray[np.float32]:
        """One new token a sequence.  Logits [B, V] float32."""
        few = len(batch.q_lens) <= FEW and self._prefill_decodes_few
        return self._call("prefill" if few else "decode", batch, caches)

    def prefill(self, batch: Batch, caches: Sequence[Any]) -> NDArray[np.float32]:
        """Any number of new tokens a sequence, after any cached prefix.  Logits of the last, [B, V] float32.

        On Ascend the prefill graph's flash attention sees the new tokens only: after a prefix the decode graph
        runs.
        """
        if self.target != "cpu":
            cached = bool((batch.context_lens > batch.q_lens).any())
            return self._call("decode" if cached else "prefill", batch, caches)
        out: NDArray[np.float32] | None = None
        for members, last, part in chunks(batch, self.page, self.native):
            logits = self._call("prefill", part, caches)
            if out is None:
                out = np.empty((len(batch.q_lens), logits.shape[1]), np.float32)
            for row, (member, is_last) in enumerate(zip(members, last, strict=True)):
                if is_last:
                    out[member] = logits[row]
        assert out is not None
        return out

    @property
    def compiles(self) -> int:
        """How often MindSpore has compiled a graph of ours: once each."""
        return sum(len(cell.compile_cache) for cell in self.cells.values())

    @property
    def compiles_since_ready(self) -> int:
        return self.compiles - self._compiles_at_ready

    def warm_up(self, strict: bool = False) -> None:
        """Run all graphs on a cache of their own.  Later calls of any shape compile nothing: `strict` tries other
        shapes too and raises EnvironmentProblem if that compiles."""
        from mindspore import Tensor

        page = self.page
        batches = ([1] * (FEW + 1), [page + 1, 2, 1, 1]) if strict else ([1] * (FEW + 1),)
        pages = max(sum(-(-(n + 1) // page) for n in lengths) for lengths in batches)  # each decodes one more
        shape = [pages, page, *(n or 1 for n in self.cache_shape[2:])]
        kind = _types()[self._inputs[-1].dtype]
        caches = [Tensor(np.zeros(shape, np.float32), kind) for _ in range(self.num_caches)]
        for lengths in batches:
            sequences = Sequences(len(lengths), page)
            self.prefill(sequences.advance([[0] * n for n in lengths]), caches)
            self.decode(sequences.advance([[0] for _ in lengths]), caches)
            if self._compiles_at_ready and self.compiles_since_ready:
                tested = ", ".join(v + "x" for v in TESTED_MINDSPORE)
                raise EnvironmentProblem(
                    f"MindSpore compiled {self.compiles_since_ready} times more for a batch of another shape: "
                    "requests would wait for it.",
                    f"Compile again with one of mindspore {tested}, or start with --no-strict-aot.",
                )
            self._compiles_at_ready = self.compiles

    def _call(self, phase: Phase, batch: Batch, caches: Sequence[Any]) -> NDArray[np.float32]:
        from mindspore import Tensor

        phase = "native" if self.native else phase
        inputs = [Tensor.from_numpy(np.ascontiguousarray(a, np.int32)) for a in batch.arrays]
        if self.target != "cpu":
            dtype = self.entries[phase].inputs[len(inputs)].dtype
            inputs.append(Tensor(attention_mask(phase, batch, dtype), _types()[dtype]))
        logits = self.cells[phase](*inputs, *caches)
        found: NDArray[np.float32] = (logits if self.target == "cpu" else logits.float()).asnumpy()
        return found


def _types() -> dict[str, Any]:
    import mindspore as ms

    return {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16, "int32": ms.int32}


def chunks(batch: Batch, page: int, ragged: bool) -> Iterator[tuple[list[int], list[bool], Batch]]:
    """Cut a batch into calls of bounded size: (members, whether each is at its end, the part).  Unless a graph
    takes `ragged` sequences, it makes each as long as the longest.

    A sequence is cut in order, and never twice in one call: later chunks read what earlier ones cached.
    """
    ends = np.cumsum(batch.q_lens)
    members: list[tuple[int, int, int]] = []  # sequence, first token, tokens
    longest = tokens = 0
    limit = RAGGED_TOKENS if ragged else CHUNK_TOKENS
    for sequence, (q_len, end) in enumerate(zip(batch.q_lens, ends, strict=True)):
        for begin in range(0, int(q_len), limit):
            size = min(limit, int(q_len) - begin)
            places = tokens + size if ragged else (len(members) + 1) * max(longest, size)
            full = places > limit
            if members and (full or members[-1][0] == sequence):
                yield _part(batch, members, page)
                members, longest, tokens = [], 0, 0
            members.append((sequence, int(end - q_len) + begin, size))
            longest, tokens = max(longest, size), tokens + size
    if members:
        yield _part(batch, members, page)


def _part(batch: Batch, members: list[tuple[int, int, int]], page: int) -> tuple[list[int], list[bool], Batch]:
    ends = np.cumsum(batch.q_lens)
    sequences = [m[0] for m in members]
    tokens = np.concatenate([np.arange(first, first + size) for _, first, size in members])
    left = np.array([ends[s] - (first + size) for s, first, size in members])
    context = batch.context_lens[sequences] - left
    width = -(-int(context.max()) // page)
    part = Batch(
        input_ids=batch.input_ids[tokens],
        positions=batch.positions[tokens],
        slots=batch.slots[tokens],
        block_tables=batch.block_tables[sequences, :width],
        context_lens=context.astype(np.int32),
        q_lens=np.array([size for _, _, size in members], np.int32),
    )
    return sequences, [bool(n == 0) for n in left], part


def as_nz(matrix: Any) -> Any:
    """A matrix in the NZ format, on the device: what a 310P multiplies fastest.  Has not run on a device."""
    from mindspore.ops.auto_generate import format_cast

    return format_cast(matrix, NZ)


def check_version(path: Path, graph: Graph) -> None:
    """Raises ArtifactError if the graph is from a MindSpore that was never tried with this code."""
    if not graph.mindspore.startswith(TESTED_MINDSPORE):
        raise ArtifactError(
            f"{path}: was compiled with mindspore {graph.mindspore}; tested are "
            f"{', '.join(v + 'x' for v in TESTED_MINDSPORE)}.",
            f"Run `msconv compile` again with one of them (target {graph.target}).",
        )


def _load(path: Path, kernels: Library, groups: Mapping[str, str]) -> Any:
    """MindSpore's graph of a file.  Where it names compiled kernels, those of this machine take their place, and
    groups get the names that they have here."""
    import mindspore as ms

    if kernels.path is None and not groups:
        return ms.load(str(path))
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto.FromString(path.read_bytes())
    for attribute in (a for p in model.primitives for a in p.attribute if a.name == "group"):
        attribute.s = groups.get(attribute.s.decode(), attribute.s.decode()).encode()
    customs = (p for p in model.primitives if p.op_type == "Custom" and kernels.path is not None)
    for attribute in (a for p in customs for a in p.attribute):
        if attribute.name == "func_name":
            name, _, function = attribute.s.decode().partition(":")
            if name != LIBRARY:
                raise ArtifactError(
                    f"{path}: wants the kernels {name}; these are {LIBRARY}.",
                    "Compile it again with this version: `msconv compile`.",
                )
            attribute.s = f"{kernels.path}:{function}".encode()
    with tempfile.NamedTemporaryFile(suffix=".mindir") as file:
        file.write(model.SerializeToString())
        file.flush()
        return ms.load(file.name)


def _bind(root: Path, graph: Graph, tensors: dict[str, Any], kernels: Library, groups: Mapping[str, str]) -> Any:
    """A GraphCell with its weights, compiled once for all shapes."""
    from mindspore import Tensor, nn

    path = root / graph.path
    check_version(path, graph)
    check_size(path, graph.size)
    if digest_bytes(path.read_bytes()) != graph.digest:
        raise ArtifactError(
            f"{path}: was altered: its digest is not the manifest's.",
            f"Run `msconv compile {root} --target {graph.target}` again.",
        )
    cell = nn.GraphCell(_load(path, kernels, groups))
    wanted = {p.name: p for p in graph.parameters}
    if set(cell._params) != set(wanted):
        odd = sorted(set(cell._params) ^ set(wanted))
        raise ArtifactError(f"{path}: its parameters are not the manifest's: {odd[:5]}.")
    for name, param in cell._params.items():
        if list(param.shape) != wanted[name].shape:
            raise ArtifactError(f"{path}: {name} has shape {list(param.shape)}, not {wanted[name].shape}.")
        param.assign_value(as_nz(tensors[name]) if name in graph.nz else tensors[name])
    # without this every new block-table width compiles again
    cell.set_inputs(*(Tensor(shape=list(i.shape), dtype=_types()[i.dtype]) for i in graph.inputs))
    return cell

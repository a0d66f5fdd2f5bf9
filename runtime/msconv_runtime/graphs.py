"""The graphs of one rank: loaded, warmed up, and the right one called for each batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from .artifact import OF_TARGET, Artifact, Graph, GraphInput, GraphParameter
from .artifact.weights import LoadMode, RankWeights
from .binding import bind, compile_only, element_type, load_weights, run_again, tensor
from .errors import ArtifactError, EnvironmentProblem
from .kernels import Library, library, use_threads
from .paging import CHUNK_TOKENS, RAGGED_TOKENS, Batch, Sequences, attention_mask, chunks
from .roles import (
    COMPILED,
    DECODE,
    DRAFT_DECODE,
    DRAFT_EXTEND,
    HIDDEN,
    LOGITS,
    PREFILL,
    ROLES,
    VERIFY,
    Role,
    graph_for,
    of_draft,
    of_model,
    of_variant,
)
from .single import SingleRequest, are_the_same
from .targets import target_named
from .versions import MINDSPORE, named

Outputs = dict[str, NDArray[np.float32]]

LOGITS_BYTES = 32 << 20  # of one call's, where a graph gives those of every token
FEWEST_ROWS = 16
WARM_UP_SEQUENCES = 3  # so many that each graph of a set is asked for
NO_KERNELS = Library(None, "the artifact has no graph of compiled kernels, or it was not asked for")


@dataclass(frozen=True)
class Place:
    """Where graphs run.  `page`: slots a page of the caches, where the graphs leave it free; 0 for the smallest
    that the target takes.  `groups`: other names for the groups that the graphs name, those under which MindSpore
    knows them here.  `ranks_here`: how many share this machine's processors, 0 for all of the artifact's."""

    rank: int = 0
    page: int = 0
    groups: Mapping[str, str] = field(default_factory=dict)
    ranks_here: int = 0


class Lender(Protocol):
    """What a draft drafts for, as far as it takes weights from it.  Graphs are one."""

    artifact: Artifact
    tensors: dict[str, Any]

    def lend(self, wanted: GraphParameter) -> Any: ...


class Graphs:
    """The graphs of one rank, sharing one set of weights: those of compiled kernels, where this machine has them
    and `compiled` allows it, else those of MindSpore's own operations.

    `model`: the graphs of the model whose draft these shall be, loaded already.  Weights that both read are
    there once, also where the draft is an artifact of its own."""

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        place: Place = Place(),
        mode: LoadMode = "mmap",
        check: bool = False,
        compiled: bool = True,
        model: Lender | None = None,
    ) -> None:
        self.artifact, self.mode = artifact, mode
        self.target, self.place = target_named(target), place
        self.is_draft = model is not None
        entries = of_draft(artifact.graphs(target)) if self.is_draft else of_model(artifact.graphs(target))
        if not entries:
            raise ArtifactError(
                f"{artifact.root}: has no graphs of a draft for {target}.",
                f"Run `msconv compile {artifact.root} --target {target}`, if its weights have one.",
            )
        faster = of_variant(entries, COMPILED)
        self.library = library() if compiled and faster else NO_KERNELS
        self.is_compiled = self.library.path is not None
        if self.is_compiled:
            use_threads(place.ranks_here or artifact.tp)
        self.entries: dict[str, Graph] = faster if self.is_compiled else of_variant(entries, "")
        self._compiles_at_ready = 0
        self._known_caches: list[Any] = []  # of the last call
        self._ran_with_them: set[str] = set()  # roles of the graphs that did
        self._single: SingleRequest | None = None
        started = time.monotonic()
        graphs = list(self.entries.values())
        self.tensors: dict[str, Any] = load_weights(artifact, graphs, place.rank, mode, check, self._lent(model))
        loaded = time.monotonic()
        self.cells = {
            role: bind(artifact, g, self.tensors, self.library, place.groups) for role, g in self.entries.items()
        }
        self.seconds = {mode: loaded - started, "bind": time.monotonic() - loaded}

    def _lent(self, model: Lender | None) -> Mapping[str, Any]:
        if model is None:
            return {}
        reads = {p.name: p for g in self.entries.values() for p in g.reads if p.name.startswith(OF_TARGET)}
        own = {n: msgspec.structs.replace(p, name=n.removeprefix(OF_TARGET)) for n, p in reads.items()}
        shared = model.tensors if model.artifact.root == self.artifact.root else {}
        return {**shared, **{name: model.lend(p) for name, p in own.items()}}

    def lend(self, wanted: GraphParameter) -> Any:
        """A weight for a draft that is another artifact: the same memory, if it takes it in the same type.  Raises
        ArtifactError if there is none of this shape."""
        weights = RankWeights(self.artifact, self.place.rank, self.mode)
        found = weights.tensors.get(wanted.name)
        if found is None or found.shape != wanted.shape:
            has = f"it has {found.shape}" if found else "it has none"
            raise ArtifactError(
                f"{self.artifact.root}: the draft takes {wanted.name} of shape {wanted.shape} from it, {has}.",
                "Serve it with a draft that was made for it.",
            )
        read = {p.name: p.dtype for g in self.entries.values() for p in g.reads}
        if read.get(wanted.name) == wanted.dtype:
            return self.tensors[wanted.name]
        return tensor(weights.array(wanted.name, wanted.dtype)[0], wanted.dtype)

    @property
    def caches(self) -> list[GraphInput]:
        """Each [pages, page, heads, width] with None for what is free: two a layer, or one where both come from
        the same latent."""
        return next(iter(self.entries.values())).caches

    @property
    def page(self) -> int:
        """Slots a page of the caches: the graphs', or the place's where they leave it free."""
        return self.caches[0].shape[1] or self.place.page or self.target.paging.pages[-1]

    def decode(self, batch: Batch, caches: Sequence[Any]) -> NDArray[np.float32]:
        """One new token a sequence.  Logits [B, V] float32."""
        return self.run(DECODE, batch, caches)[LOGITS]

    def prefill(self, batch: Batch, caches: Sequence[Any]) -> NDArray[np.float32]:
        """Any number of new tokens a sequence, after any cached prefix.  Logits of the last, [B, V] float32."""
        return self.in_parts(PREFILL, batch, caches)[LOGITS]

    @property
    def vocab_size(self) -> int:
        """Tokens that a row of logits is for."""
        return next(o.shape[-1] or 0 for g in self.entries.values() for o in g.outputs if o.name == LOGITS)

    @property
    def gives_all_logits(self) -> bool:
        """Whether there is a graph for `every_token`."""
        return VERIFY.name in self.entries

    @property
    def rows_at_once(self) -> int:
        """How many tokens `every_token` should be asked for at once: their logits are some megabytes."""
        return min(max(FEWEST_ROWS, LOGITS_BYTES // (4 * self.vocab_size)), CHUNK_TOKENS)

    def every_token(self, batch: Batch, caches: Sequence[Any]) -> NDArray[np.float32]:
        """Any number of new tokens a sequence, after any cached prefix.  Logits of all of them, [T, V] float32, in
        the batch's order.  In calls of `rows_at_once` tokens; what they give together, the caller bounds.  Raises
        ArtifactError if the artifact has no such graph."""
        return self.in_parts(VERIFY, batch, caches, self.rows_at_once)[LOGITS]

    def in_parts(
        self, asked: Role, batch: Batch, caches: Sequence[Any], most: int = RAGGED_TOKENS, hidden: Any = None
    ) -> Outputs:
        """The outputs, by name, of the graph that answers `asked`: logits as its role says, hidden states of every
        new token.  Cut into calls of at most `most` tokens where a graph reads what an earlier one cached.
        `hidden` [T, ...]: what a draft's graph takes beside the tokens."""
        found: dict[str, list[NDArray[np.float32]]] = {}
        done = 0
        for last, part in self._cut(asked, batch, most):
            count = len(part.input_ids)  # parts have the batch's tokens in its order
            given = None if hidden is None else hidden[done : done + count]
            done += count
            for name, values in self.run(asked, part, caches, given).items():
                found.setdefault(name, []).append(values if asked.is_of_all(name) or all(last) else values[last])
        return {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in found.items()}

    def _cut(self, asked: Role, batch: Batch, most: int = RAGGED_TOKENS) -> Iterator[tuple[list[bool], Batch]]:
        """The calls that run a batch, with which of their sequences end in them."""
        if asked.begins and not self.target.prefill_reads_cache:
            yield [True] * len(batch.q_lens), batch
            return
        ragged = self.is_compiled or not self.target.device.is_host
        for _, last, part in chunks(batch, self.page, ragged, most):
            yield last, part

    def run(self, asked: Role, batch: Batch, caches: Sequence[Any], hidden: Any = None) -> Outputs:
        """The outputs, by name, of the graph that answers `asked` for this batch, in one call."""
        graph = graph_for(self.entries, asked, batch)
        if self._single is not None and asked is DECODE and self._single.takes(batch, caches):
            return self._outputs(graph, run_again(self._single.cell, self._single.inputs(batch)))
        return self._call(graph, batch, caches, hidden)

    def keep_caches(self, caches: Sequence[Any]) -> float:
        """These caches are those of all later calls: what decodes one request is bound for them once more, if
        compiled kernels do it, and not yet.  To be called before a request waits for it; gives the seconds that it
        took."""
        if not self.is_compiled or self.is_draft or (self._single is not None and self._single.is_for(caches)):
            return 0.0
        started = time.monotonic()
        batch = Sequences(1, self.page).advance([[0]])
        graph = graph_for(self.entries, DECODE, batch)
        cell = bind(self.artifact, graph, self.tensors, self.library, self.place.groups, is_dynamic=False)
        single = SingleRequest(cell, caches)
        compile_only(cell, single.arguments)
        self._single = single
        return time.monotonic() - started

    def _call(self, graph: Graph, batch: Batch, caches: Sequence[Any], hidden: Any) -> Outputs:
        cell, inputs = self.cells[graph.role], [*self._inputs(graph, batch, hidden), *caches]
        if self._knows(graph, caches):
            found = run_again(cell, inputs)
        else:
            found = cell(*inputs)
            self._ran_with_them.add(graph.role)
        return self._outputs(graph, found)

    def _outputs(self, graph: Graph, found: Any) -> Outputs:
        outputs = found if isinstance(found, tuple) else (found,)
        names = [o.name for o in graph.outputs]
        return {name: _on_host(out) for name, out in zip(names, outputs, strict=True)}

    def _knows(self, graph: Graph, caches: Sequence[Any]) -> bool:
        """Whether this graph has run with these very caches: all else in a call is made here, of the types that it
        takes."""
        if not are_the_same(caches, self._known_caches):
            self._known_caches = list(caches)
            self._ran_with_them.clear()
        return self.target.device.is_host and graph.role in self._ran_with_them

    def _compile(self, graph: Graph, batch: Batch, caches: Sequence[Any], hidden: Any) -> None:
        """What a call does before it runs: nothing, if the graph that was compiled takes this batch."""
        self.cells[graph.role].compile(*self._inputs(graph, batch, hidden), *caches)

    def _inputs(self, graph: Graph, batch: Batch, hidden: Any) -> list[Any]:
        from mindspore import Tensor

        inputs = [Tensor.from_numpy(np.ascontiguousarray(a, np.int32)) for a in batch.arrays]
        if self.target.mask is not None:
            mask = attention_mask(ROLES[graph.role].begins, batch, self.target.mask)
            inputs.append(Tensor(mask, element_type(self.target.dtype)))
        if ROLES[graph.role].is_draft:
            given = np.ascontiguousarray(fitting(graph, hidden), np.float32)
            inputs.append(Tensor(given, element_type(self.target.dtype)))
        return inputs

    @property
    def compiles(self) -> int:
        """How often MindSpore has compiled a graph of ours: once each."""
        return sum(len(cell.compile_cache) for cell in self.cells.values())

    @property
    def compiles_since_ready(self) -> int:
        return self.compiles - self._compiles_at_ready

    def warm_up(self, strict: bool = False) -> None:
        """Run each graph once, on a cache of its own.  Later calls of any shape compile nothing: `strict` asks for
        other shapes too, without running them, and raises EnvironmentProblem if that compiles."""
        page = self.page
        batches: list[list[int]] = [[1] * WARM_UP_SEQUENCES, *([[page + 1, 2, 1, 1]] if strict else [])]
        pages = max(sum(-(-(n + 2) // page) for n in lengths) for lengths in batches)  # each gets two more
        caches = [self._blank(cache, pages) for cache in self.caches]
        warm: set[str] = set()
        for lengths in batches:
            for asked, batch in self._one_of_each(lengths):
                graph = graph_for(self.entries, asked, batch)
                hidden = np.zeros((len(batch.input_ids), hidden_width(graph))) if self.is_draft else None
                (self._compile if graph.role in warm else self._call)(graph, batch, caches, hidden)
                warm.add(graph.role)
            if self._compiles_at_ready and self.compiles_since_ready:
                raise EnvironmentProblem(
                    f"MindSpore compiled {self.compiles_since_ready} times more for a batch of another shape: "
                    "requests would wait for it.",
                    f"Compile again with mindspore {named(MINDSPORE, ' or ')}, or start with --no-strict-aot.",
                )
            self._compiles_at_ready = self.compiles

    def _one_of_each(self, lengths: list[int]) -> Iterator[tuple[Role, Batch]]:
        """The calls of each role, for prompts of these lengths and one token after another."""
        sequences, first = Sequences(len(lengths), self.page), [[0] * n for n in lengths]
        roles = [DRAFT_EXTEND, DRAFT_DECODE] if self.is_draft else [PREFILL, DECODE]
        if not self.is_draft and self.gives_all_logits:
            roles.append(VERIFY)
        for number, role in enumerate(roles):
            batch = sequences.advance([[0] for _ in lengths] if number else first)
            most = self.rows_at_once if role is VERIFY else RAGGED_TOKENS
            yield from ((role, part) for _, part in self._cut(role, batch, most))

    def _blank(self, cache: GraphInput, pages: int) -> Any:
        from mindspore import Tensor

        shape = [pages, self.page, *(n or 1 for n in cache.shape[2:])]
        return Tensor(np.zeros(shape, np.float32), element_type(cache.dtype))


def hidden_width(graph: Graph) -> int:
    """Of the hidden states that it takes; 0: it takes none."""
    return next((i.shape[-1] or 0 for i in graph.inputs if i.kind == "hidden"), 0)


def fitting(graph: Graph, hidden: NDArray[Any]) -> NDArray[Any]:
    """Hidden states [T, n] as a draft's graph takes them.  One that runs first and further steps takes streams of
    its target beside own states: those that are not there are zeros.  Raises ArtifactError for others."""
    width, own = hidden_width(graph), next(o.shape[-1] or 0 for o in graph.outputs if o.name == HIDDEN)
    count, given = hidden.shape
    if given == width:
        return hidden
    if given not in (own, width - own) or width <= own:
        raise ArtifactError(f"{graph.path}: takes hidden states of {width} values, {given} were given.")
    zeros = np.zeros((count, width - given), hidden.dtype)
    return np.concatenate([zeros, hidden] if given == own else [hidden, zeros], 1)


def _on_host(output: Any) -> NDArray[np.float32]:
    import mindspore

    wide = output if output.dtype == mindspore.float32 else output.float()
    array: NDArray[np.float32] = wide.asnumpy()
    return array

"""A proof tried on this machine: its own code on one layer of each kind, at the model's widths, weights drawn.

Nothing is compared.  What is found is how long each piece takes here; how often each comes, who asks knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from msconv_runtime.artifact import Artifact

from ..layout.plan import Plan
from ..mindir.interpreter import Interpreter, join
from ..mindir.program import Node, Program
from .arena import Arena
from .lockstep import Lockstep
from .rank_files import read_as_stored
from .reference import LAYER
from .scenario import Call
from .source_weights import FUSED
from .together import in_layers

HEAD_ROWS = 4096  # of the head, that are multiplied
SAMPLE_BYTES = 128 << 20
SCALE = 0.02  # of drawn weights: activations stay finite


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass: of each layer, and of the head, for as many rows of it as were there."""

    layers: tuple[float, ...]
    head: float
    head_rows: int


class Drawn:
    """Values of any shape, drawn once; `seconds`: what making them has taken, which a proof does not do."""

    def __init__(self) -> None:
        self._block = torch.randn(1 << 20) * SCALE
        self.seconds = 0.0

    def values(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory of its own, as weights have it."""
        started = time.perf_counter()
        out = torch.empty(prod(shape), dtype=dtype or torch.float32)
        for begin in range(0, len(out), len(self._block)):
            piece = out[begin : begin + len(self._block)]
            piece.copy_(self._block[: len(piece)])
        self.seconds += time.perf_counter() - started
        return out.view(*shape)


class SameExperts:
    """Experts of transformers' module, all with the same values: [i] is the i-th, [O, I]."""

    def __init__(self, drawn: Drawn, shape: Sequence[int]) -> None:
        self._value = drawn.values(shape[1:])

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._value


def try_reference(model: Any, lengths: Sequence[int]) -> Pass:
    """One pass of transformers' model, none of whose weights are there, over sequences of these lengths."""
    drawn, marks = Drawn(), list[float]()
    layers = list(model.model.layers)
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            for fused in FUSED:
                if fused in module._parameters:
                    shape = module._parameters.pop(fused).shape
                    setattr(module, fused, SameExperts(drawn, shape))
    for name, module in model.named_modules():
        if name == "model.norm" or LAYER.fullmatch(name):
            module.load_state_dict({k: drawn.values(t.shape) for k, t in module.state_dict().items()}, assign=True)

    def mark(*_: Any) -> None:
        marks.append(time.perf_counter())

    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    hooks = [layers[0].register_forward_pre_hook(mark), *(m.register_forward_hook(mark) for m in layers)]
    x = drawn.values([1, sum(lengths), hidden]) / SCALE
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        model.model(
            inputs_embeds=x[:, :1], position_ids=positions[:, :1], use_cache=False
        )  # what only a first run takes
        marks.clear()
        model.model(inputs_embeds=x, position_ids=positions, use_cache=False)
        head = drawn.values([min(vocab, HEAD_ROWS), hidden])
        started = time.perf_counter()
        torch.nn.functional.linear(x[0], head)
        ended = time.perf_counter()
    for hook in hooks:
        hook.remove()
    took = [b - a for a, b in pairwise(marks)]
    return Pass(tuple(took), ended - started, len(head))


class DrawnRank:
    """One rank's weights for the interpreter: in float32, but for those that a proof leaves as they are stored.
    Experts are one expert again and again."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.drawn = Drawn()
        self._declared = {name: of for program in programs for name, of in program.declared.items()}
        self._as_stored = read_as_stored(programs)
        self._values: dict[str, torch.Tensor] = {}

    def get(self, name: str, declared: torch.dtype | None) -> torch.Tensor:
        if name not in self._values:
            dtype, shape = self._declared[name]
            self._values[name] = self._made(name, dtype or torch.float32, shape)
        return self._values[name]

    def release(self) -> None:
        """The layer is done."""
        self._values.clear()

    def _made(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)  # where the rank's rows or experts begin
        kept = dtype if name in self._as_stored else torch.float32
        if len(shape) == 3:
            return self.drawn.values(shape[1:], kept).expand(shape)
        return self.drawn.values(shape, kept)


class OneRank(Lockstep):
    """The first rank alone, of an artifact without weights.  A collective takes a rank's share of its time."""

    def _interpreter(self, artifact: Artifact) -> Interpreter:
        self.tp = 1  # so many ranks have caches
        self.weights = DrawnRank(list(self.programs.values()))
        return Interpreter(self.context, [self.weights], _alone)

    @property
    def head_rows(self) -> int:
        """Of the vocabulary, which is divided as the embedding is."""
        return next(iter(self.programs.values())).declared["model.embed_tokens.weight"][1][0]


def try_rank(root: Path, target: str, variant: str, calls: Sequence[Call]) -> Pass:
    """All calls through one rank's graphs, layer by layer."""
    rank = OneRank(Artifact(root), target, variant=variant)
    executions, names = rank.executions(list(calls))
    took: list[float] = []
    with torch.no_grad():
        started = time.perf_counter()
        for _ in in_layers(executions, names, rank.num_layers):
            took.append(time.perf_counter() - started - rank.weights.drawn.seconds)
            rank.weights.release()
            rank.weights.drawn.seconds, started = 0.0, time.perf_counter()
    *layers, head = took
    return Pass(tuple(layers), head, rank.head_rows)


def _alone(node: Node, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    if node.kind == "AllGather":
        return [torch.cat(parts * int(node.attributes["rank_size"]))]
    return [join(node, parts).clone()]


def try_reading(place: Path) -> tuple[float, float]:
    """(bytes a second from the disk, values widened to float32 a second), of bfloat16 in a safetensors file in the
    directory `place`, which is gone afterwards."""
    path = place / f".msconv-sample-{time.monotonic_ns()}.safetensors"
    arena = Arena(2 * SAMPLE_BYTES)
    try:
        save_file({"x": Drawn().values([SAMPLE_BYTES // 2], torch.bfloat16)}, path)
        _widen(path, arena)
        cold = []
        for _ in range(2):
            _forget(path)
            cold.append(_widen(path, arena))
        warm = min(_widen(path, arena) for _ in range(3))
    finally:
        path.unlink(missing_ok=True)
    read = max(min(cold) - warm, 1e-6)
    return SAMPLE_BYTES / read, SAMPLE_BYTES // 2 / warm


def try_decoding(plan: Plan) -> dict[str, float]:
    """By element type of codes in the source: how many become float32 a second, as the reference decodes them."""
    rates: dict[str, float] = {}
    for dtype in {plan.sources[name].dtype for name in plan.formats if plan.is_decoded(name)}:
        of_type = [n for n in plan.formats if plan.sources[n].dtype == dtype and plan.is_decoded(n)]
        name = min(of_type, key=lambda n: prod(plan.sources[n].shape))
        made = {n: _ones(plan, n) for n in (name, *plan.formats[name].companions(name))}

        def read(of: str, made: dict[str, torch.Tensor] = made) -> torch.Tensor:
            return made[of].to(torch.float32, copy=True)

        def rounds(values: Any) -> Any:
            return values.to(getattr(torch, plan.dtype)).to(torch.float32)

        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            plan.formats[name].reference(name, read, rounds)
            seconds.append(time.perf_counter() - started)
        rates[dtype] = prod(plan.sources[name].shape) / min(seconds)
    return rates


def _ones(plan: Plan, name: str) -> torch.Tensor:
    return torch.ones(plan.sources[name].shape).to(getattr(torch, plan.sources[name].dtype))


def _widen(path: Path, arena: Arena) -> float:
    """Seconds in which a file's values become float32, as weights of a proof do."""
    arena.clear()
    started = time.perf_counter()
    with safe_open(path, framework="pt") as opened:
        arena.widened(opened.get_tensor("x"))
    return time.perf_counter() - started


def _forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as f:
        os.fdatasync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

"""Ascend graphs on the rehearsal device: executed by msconv's interpreter on the memory that they were given, and
recorded call by call."""

from __future__ import annotations

import faulthandler
import functools
from typing import Any

import torch

from msconv.rehearsal.protocol import HIDDEN, INPUTS, graph_file

from .hccl import Communicator
from .record import RECORD
from .settings import SETTINGS

NZ = 29  # CANN's number of the FRACTAL_NZ format
CACHE_DIMENSIONS = 4
_opened: list[str] = []  # graphs of this process, in their order: a draft may have those of its target


class DeviceTensor:
    """A MindSpore tensor on the device: what a tensor of torch_npu becomes by DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.torch = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.torch.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.torch.dtype

    def asnumpy(self) -> Any:
        """A copy on the host."""
        return self.torch.cpu().numpy()


_in_nz: dict[int, Any] = {}  # tensors in the NZ format, by identity


def as_nz(matrix: Any, form: int) -> Any:
    """MindSpore's format_cast.  The rehearsal's memory has one format: the cast is noted."""
    assert form == NZ, f"format_cast to format {form}"
    cast = matrix.copy()
    _in_nz[id(cast)] = cast
    return cast


def run_graph(ms: Any, cell: Any, data: bytes, inputs: tuple[Any, ...], groups: dict[str, Communicator]) -> Any:
    """Logits, as a MindSpore tensor of float32."""
    return open_graph(ms, cell, data, groups).run(inputs)


def open_graph(ms: Any, cell: Any, data: bytes, groups: dict[str, Communicator]) -> _Graph:
    """The graph of a cell; what was bound to it is recorded when it is opened."""
    graph: _Graph | None = cell.__dict__.get("_rehearsed")
    if graph is None:
        graph = cell.__dict__["_rehearsed"] = _Graph(ms, cell, data, groups)
    return graph


@functools.cache
def _watch_faults() -> None:
    """Have a fault of memory told: where in Python, and whether it was device memory.  By the first graph all is
    imported that puts handlers of its own in place."""
    faulthandler.disable()
    faulthandler.enable()
    torch.ops.rehearsal.watch_faults()


class _BoundWeights:
    """The parameters of a cell as the interpreter takes them."""

    def __init__(self, ms: Any, cell: Any, context: Any) -> None:
        self._ms, self._cell, self._context = ms, cell, context
        self._cache: dict[str, torch.Tensor] = {}

    def get(self, name: str, declared: torch.dtype | None) -> torch.Tensor:
        if name not in self._cache:
            bound = host_tensor(self._ms, self._cell._params[name])
            self._cache[name] = bound.to(self._context.keep(bound.dtype))
        return self._cache[name]


class _Graph:
    """A loaded graph of one rank."""

    def __init__(self, ms: Any, cell: Any, data: bytes, groups: dict[str, Communicator]) -> None:
        from msconv.mindir.interpreter import Interpreter
        from msconv.mindir.kernels import Context
        from msconv.mindir.program import parse_bytes
        from msconv_runtime.artifact import digest_bytes

        self._ms, self._cell, self._groups = ms, cell, groups
        self._program = parse_bytes(data, "the graph that was loaded")
        self._context = Context(SETTINGS.exact, self._program.dtype)
        weights = _BoundWeights(ms, cell, self._context)
        self._interpreter = Interpreter(self._context, [weights], self._collective)
        self.identity = digest_bytes(data)
        _watch_faults()
        RECORD.file(graph_file(self.identity), data)
        self.number = len(_opened)
        _opened.append(self.identity)
        parameters = self._parameters(digest_bytes)
        RECORD.event("graph", identity=self.identity, number=self.number, parameters=parameters)
        RECORD.event("groups", identity=self.identity, groups=self._named_groups())

    def _parameters(self, digest: Any) -> list[dict[str, Any]]:
        found = []
        for name, parameter in self._cell._params.items():
            bound = host_tensor(self._ms, parameter).contiguous()
            found.append(
                {
                    "name": name,
                    "dtype": str(bound.dtype).removeprefix("torch."),
                    "digest": digest(bound.flatten().view(torch.uint8).numpy().data),
                    "nz": any(parameter.data_ptr() == cast.data_ptr() for cast in _in_nz.values()),
                }
            )
        return found

    def _named_groups(self) -> list[dict[str, Any]]:
        """The groups that the graph names, beside SGLang's own group of the ranks that share the model."""
        from sglang.srt.runtime_context import get_parallel

        server = get_parallel().tp_group.device_group._get_backend(torch.device("npu"))
        names = sorted({str(n.attributes["group"]) for n in self._program.nodes if "group" in n.attributes})
        return [{"name": n, "handle": self._handle(n), "server": server.handle} for n in names]

    def _handle(self, name: str) -> int:
        return self._groups[name].handle if name in self._groups else 0

    def run(self, inputs: tuple[Any, ...]) -> Any:
        self.compile(inputs)
        first = next(i for i, given in enumerate(inputs) if len(given.shape) == CACHE_DIMENSIONS)
        given = [host_tensor(self._ms, i) for i in inputs[:first]]
        for i in range(len(INPUTS) - 1, first):  # the mask, and a draft's hidden states
            given[i] = given[i].to(self._context.keep(given[i].dtype))
        caches = inputs[first:]
        opened = [_cache(self._ms, c) for c in caches]
        own = not isinstance(caches[0], DeviceTensor)
        about = {"graph": self.identity, "number": self.number, "warm_up": own}
        about |= {"caches": _describe(caches), "error": ""}
        tensors = dict(zip((*INPUTS, HIDDEN), given, strict=False))
        try:
            step = self._interpreter.run(self._program, [[*given, *opened]])
        except Exception as e:  # recorded: the inputs say why
            RECORD.call(about | {"error": f"{type(e).__name__}: {e}"}, tensors)
            raise
        tensors |= {f"probe {name}": torch.from_numpy(values) for name, values in step.probes.items()}
        (outputs,) = step.outputs
        states = {"states": torch.from_numpy(outputs[1]).clone()} if outputs[1:] else {}  # a probe may be the same
        RECORD.call(about, tensors | {"logits": torch.from_numpy(outputs[0])} | states)
        found = tuple(self._ms.Tensor(output) for output in outputs)
        return found[0] if len(found) == 1 else found

    def compile(self, inputs: tuple[Any, ...]) -> None:
        """MindSpore compiles once for each set of shapes, in which all sizes of a free dimension are one."""
        declared = self._cell.__dict__.get("_declared", inputs)
        self._cell.compile_cache.add(tuple(tuple(i.shape) for i in declared))
        self._check(inputs)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        """What MindSpore refuses: another number of inputs, other dimensions, other element types."""
        declared = self._cell.__dict__.get("_declared", inputs)
        assert len(inputs) == len(declared), f"{len(inputs)} inputs for a graph that takes {len(declared)}"
        for i, (given, wanted) in enumerate(zip(inputs, declared, strict=True)):
            fits = len(given.shape) == len(wanted.shape) and all(
                n in (-1, None) or n == m for n, m in zip(wanted.shape, given.shape, strict=True)
            )
            kind, expected = (str(x.dtype).removeprefix("torch.").lower() for x in (given, wanted))
            fits_type = kind == expected or (SETTINGS.exact and kind == "float32" and "float" in expected)
            assert fits and fits_type, (
                f"input {i}: {kind} {list(given.shape)}, the graph takes {expected} {list(wanted.shape)}"
            )

    def _collective(self, node: Any, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        from msconv.mindir.interpreter import join

        name = node.attributes["group"]
        assert name in self._groups, (
            f"{node.where}: MindSpore knows no group {name!r}, only {sorted(self._groups)}"
        )
        gloo = self._groups[name].gloo
        mine = parts[0].contiguous()
        found = [torch.empty_like(mine) for _ in range(gloo.size())]
        gloo.allgather([found], [mine]).wait()
        return [join(node, found)]


def host_tensor(ms: Any, tensor: Any) -> torch.Tensor:
    """A tensor of MindSpore or of the device as torch's, on the host.  Device memory is open while it lives."""
    if isinstance(tensor, DeviceTensor):
        return torch.ops.rehearsal.host_view(tensor.torch)
    import numpy as np

    values = np.ascontiguousarray(tensor.asnumpy())
    if tensor.dtype == ms.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


_scratch: dict[int, tuple[Any, torch.Tensor]] = {}  # of caches that are MindSpore's own, the memory here


def _cache(ms: Any, cache: Any) -> torch.Tensor:
    """A cache to be written in place."""
    if isinstance(cache, DeviceTensor):
        return host_tensor(ms, cache)
    known = _scratch.get(id(cache))
    if known is None or known[0] is not cache:
        own = host_tensor(ms, cache).clone()
        known = _scratch[id(cache)] = (cache, own.float() if SETTINGS.exact else own)
    return known[1]


def _describe(caches: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Each cache's shape and address, and which buffer of SGLang's own pool it is: `k 3`, `part of k 3`, none."""
    if not isinstance(caches[0], DeviceTensor):
        return [{"shape": list(c.shape), "at": id(c), "is": ""} for c in caches]
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    pool = get_token_to_kv_pool()
    layers = range(pool.start_layer, pool.start_layer + pool.layer_num)
    buffers: dict[int, tuple[str, int]] = {}
    for kind, get in (("v", pool.get_value_buffer), ("k", pool.get_key_buffer)):  # a latent is both: then `k`
        for layer in layers:
            buffers[get(layer).data_ptr()] = (f"{kind} {layer}", get(layer).numel())
    found = []
    for cache in caches:
        at = cache.torch.data_ptr()
        name, size = buffers.get(at, ("", 0))
        part = "part of " if name and cache.torch.numel() != size else ""
        found.append({"shape": list(cache.shape), "at": at, "is": part + name})
    return found

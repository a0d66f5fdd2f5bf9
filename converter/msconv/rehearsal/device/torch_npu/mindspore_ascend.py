"""MindSpore's Ascend half: what SGLang's runner and msconv's slot ask of it.

The ranks meet at a store of torch's, at the address of MindSpore's scheduler; rank 0 keeps it, since the
scheduler's process takes long to start.  Graphs are executed by `graphs`.  What is asked in another way than
MindSpore documents is an AssertionError; all of it is recorded.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing.util
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from . import hccl
from .graphs import DeviceTensor, as_nz, open_graph, run_graph
from .record import RECORD

MEET = datetime.timedelta(seconds=120)
ASCEND_ONLY = ("infer_boost", "jit_level", "graph_kernel_flags")
GROUPS: dict[str, hccl.Communicator] = {}  # by MindSpore's name


class _Cluster:
    """The ranks that MindSpore knows."""

    def __init__(self) -> None:
        self.device: int | None = None
        self.rank, self.size = 0, 0
        self.store: Any = None

    def meet(self) -> None:
        """Wait at the scheduler until all ranks are there."""
        named = {k: os.environ.get(f"MS_{k}", "") for k in ("NODE_ID", "WORKER_NUM", "SCHED_HOST", "SCHED_PORT")}
        RECORD.event("init", **named)
        self.rank, self.size = int(named["NODE_ID"]), int(named["WORKER_NUM"])
        port = int(named["SCHED_PORT"])
        self.store = TCPStore(
            named["SCHED_HOST"], port, is_master=self.rank == 0, timeout=MEET, wait_for_workers=False
        )
        assert self.store.add(f"rank {self.rank}", 1) == 1, f"two processes are rank {self.rank} at port {port}"
        self.store.wait([f"rank {i}" for i in range(self.size)])
        # A process that multiprocessing started runs these at its end, before it waits for the scheduler
        multiprocessing.util.Finalize(None, self.leave, exitpriority=10)
        RECORD.begin(str(port), self.rank)

    def leave(self) -> None:
        with contextlib.suppress(RuntimeError):  # the scheduler is gone already
            self.store.add("left", 1)


CLUSTER = _Cluster()


def be_scheduler() -> None:
    """The scheduler's process: is there until all ranks have left, or its parent is gone."""
    host, port, size = (os.environ[f"MS_{name}"] for name in ("SCHED_HOST", "SCHED_PORT", "WORKER_NUM"))
    parent = os.getppid()
    with contextlib.suppress(RuntimeError):  # rank 0 is gone
        store = TCPStore(host, int(port), is_master=False, timeout=MEET)
        while os.getppid() == parent and store.add("left", 0) < int(size):
            time.sleep(0.2)


def install(ms: Any) -> None:
    _install_start(ms)
    _install_graphs(ms)


def _install_start(ms: Any) -> None:
    """Device, context, the meeting of the ranks, groups.  What is not for an NPU goes MindSpore's own way."""
    real = {"device": ms.set_device, "context": ms.set_context}
    real |= {"init": ms.communication.init, "group": ms.communication.create_group}

    def set_device(target: str, device_id: int | None = None) -> None:
        if target != "Ascend":
            return real["device"](target, device_id)
        assert device_id is not None
        assert 0 <= device_id < torch.npu.device_count(), f"set_device: no device {device_id}"
        assert CLUSTER.store is None, "set_device after init"
        CLUSTER.device = device_id
        RECORD.event("set_device", id=device_id)
        return real["device"]("CPU")

    def set_context(**options: Any) -> None:
        RECORD.event("set_context", **{name: str(value) for name, value in options.items()})
        if rest := {name: value for name, value in options.items() if name not in ASCEND_ONLY}:
            real["context"](**rest)

    def init(backend: str | None = None) -> None:
        if os.environ.get("MS_ROLE") == "MS_SCHED":
            return be_scheduler()
        if backend != "hccl":
            return real["init"](backend)
        assert CLUSTER.device is not None, "init('hccl') before set_device('Ascend')"
        assert CLUSTER.store is None, "init('hccl') twice"
        return CLUSTER.meet()

    def create_group(name: str, ranks: list[int], options: Any = None) -> None:
        if CLUSTER.store is None:
            return real["group"](name, ranks, options)
        assert isinstance(name, str), name
        assert isinstance(ranks, list) and CLUSTER.rank in ranks and len(set(ranks)) == len(ranks), (name, ranks)
        assert isinstance(options, ms._c_expression.GroupOptions), options
        if name in GROUPS:
            raise RuntimeError(f"create_group: the group {name} exists.")
        handle = options.hccl_config["hccl_comm"]
        group = hccl.COMMUNICATORS[handle]
        assert group.size() == len(ranks), f"create_group {name}: {ranks}, the communicator has {group.size()}"
        shared = [other for other, known in GROUPS.items() if known is group]
        RECORD.event("create_group", name=name, ranks=ranks, handle=handle, shared=shared)
        GROUPS[name] = group
        return None

    ms.set_device, ms.set_context = set_device, set_context
    ms.communication.init, ms.communication.create_group = init, create_group
    ms.communication.get_rank = lambda group=None: CLUSTER.rank
    ms.communication.get_group_size = lambda group=None: CLUSTER.size


def _install_graphs(ms: Any) -> None:
    """Tensors by DLPack, loading of graphs, and their calls."""
    real = {"dlpack": ms.utils.dlpack.from_dlpack, "load": ms.load, "inputs": ms.nn.GraphCell.set_inputs}

    def from_dlpack(capsule: Any) -> Any:
        tensor = torch.utils.dlpack.from_dlpack(capsule)
        if tensor.device.type != "npu":
            return real["dlpack"](torch.utils.dlpack.to_dlpack(tensor))
        assert tensor.is_contiguous(), "from_dlpack: the tensor is not contiguous"
        assert tensor.device.index == CLUSTER.device, f"from_dlpack: {tensor.device} on device {CLUSTER.device}"
        return DeviceTensor(tensor)

    def load(path: str, **options: Any) -> Any:
        data = Path(path).read_bytes()
        graph = real["load"](path, **options)
        LOADED[id(graph)] = (graph, data)
        return graph

    def set_inputs(cell: Any, *inputs: Any, **named: Any) -> Any:
        cell.__dict__["_declared"] = inputs
        real["inputs"](cell, *inputs, **named)
        open_graph(ms, cell, LOADED[id(cell.graph)][1], GROUPS)

    def call(cell: Any, *inputs: Any) -> Any:
        return run_graph(ms, cell, LOADED[id(cell.graph)][1], inputs, GROUPS)

    def compile_graph(cell: Any, *inputs: Any) -> None:
        open_graph(ms, cell, LOADED[id(cell.graph)][1], GROUPS).compile(inputs)

    ms.load, ms.utils.dlpack.from_dlpack = load, from_dlpack
    ms.ops.auto_generate.format_cast = as_nz
    ms.nn.GraphCell.set_inputs, ms.nn.GraphCell.__call__ = set_inputs, call
    ms.nn.GraphCell.compile = compile_graph


LOADED: dict[int, tuple[Any, bytes]] = {}  # by identity of MindSpore's graph, which is kept alive here

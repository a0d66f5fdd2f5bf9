"""torch.distributed's backend "hccl": gloo, on device memory that is open while it works.

A communicator's handle is a number that this process knows: whoever has it can be asked what it means.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist

from .settings import SETTINGS

FIRST_HANDLE = 0x7E000001
FORWARDED = (
    *("allgather", "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "alltoall"),
    *("alltoall_base", "barrier", "broadcast", "gather", "recv", "reduce", "reduce_scatter", "scatter", "send"),
    *("_allgather_base", "_reduce_scatter_base"),
)


class Communicator(dist.ProcessGroup):
    """One of torch's HCCL groups."""

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        self.gloo = dist.ProcessGroupGloo(store, rank, size, options)
        self.handle = FIRST_HANDLE + len(COMMUNICATORS)
        COMMUNICATORS[self.handle] = self

    def getBackendName(self) -> str:
        return "hccl"

    def get_hccl_comm(self, device: int) -> int:
        assert 0 <= device < SETTINGS.devices, f"get_hccl_comm: no device {device} of {SETTINGS.devices}"
        return self.handle

    def _get_backend(self, device: Any) -> Communicator:
        assert torch.device(device).type == "npu", device
        return self

    def _get_backend_name(self) -> str:
        return "hccl"


COMMUNICATORS: dict[int, Communicator] = {}


def _host(value: Any) -> Any:
    """Tensors of the device, in whatever lists, as tensors of the host over the same memory."""
    if isinstance(value, list | tuple):
        return [_host(v) for v in value]
    return torch.ops.rehearsal.host_view(value) if isinstance(value, torch.Tensor) else value


class _Work:
    """A collective under way.  Host views of device memory stay open until it has been waited for."""

    def __init__(self, work: Any, views: Any) -> None:
        self._work, self._views = work, views

    def wait(self, *args: Any) -> bool:
        done = bool(self._work.wait(*args))
        self._views = None
        return done

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


def _forward(name: str) -> Any:
    def call(self: Communicator, *args: Any, **kwargs: Any) -> Any:
        views = [_host(a) for a in args]
        work = getattr(self.gloo, name)(*views, **kwargs)
        return None if work is None else _Work(work, views)

    return call


for _name in FORWARDED:
    setattr(Communicator, _name, _forward(_name))


def _create(store: Any, rank: int, size: int, timeout: Any) -> Communicator:
    fits = isinstance(timeout, datetime.timedelta)
    return Communicator(store, rank, size, timeout if fits else datetime.timedelta(minutes=30))


dist.Backend.register_backend("hccl", _create, devices=["npu"])

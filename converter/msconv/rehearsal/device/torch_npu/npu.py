"""torch.npu: devices, streams and memory as torch_npu names them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

from .settings import SETTINGS

_ops = torch.ops.rehearsal
Event = torch.Event
config = types.SimpleNamespace(allow_internal_format=False)


class Stream(torch.Stream):
    """Work is done when it is asked for, whichever stream it is asked of."""

    def __new__(cls, device: Any = None, priority: int = 0, **known: Any) -> Stream:
        if "stream_id" in known:
            return super().__new__(cls, **known)
        at = torch.device("npu", current_device()) if device is None else torch.device(device)
        return super().__new__(cls, device=at, priority=priority)


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    return SETTINGS.devices


def current_device() -> int:
    return int(_ops.get_device())


def set_device(device: Any) -> None:
    _ops.set_device(device if isinstance(device, int) else (torch.device(device).index or 0))


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, all) bytes."""
    return SETTINGS.memory_bytes - int(_ops.allocated()), SETTINGS.memory_bytes


def memory_allocated(device: Any = None) -> int:
    return int(_ops.allocated())


memory_reserved = memory_allocated


def max_memory_allocated(device: Any = None) -> int:
    return int(_ops.peak_allocated())


def reset_peak_memory_stats(device: Any = None) -> None:
    _ops.reset_peak()


def current_stream(device: Any = None) -> Any:
    return torch.accelerator.current_stream(device)


default_stream = current_stream


def set_stream(stream: Any) -> None:
    torch.accelerator.set_stream(stream)


def get_device_name(device: Any = None) -> str:
    return SETTINGS.name


def get_soc_version() -> int:
    return SETTINGS.arch


def get_device_properties(device: Any = None) -> Any:
    return types.SimpleNamespace(
        name=SETTINGS.name,
        total_memory=SETTINGS.memory_bytes,
        uuid=f"rehearsal-{device}",
        multi_processor_count=24,
        cube_core_num=24,
        vector_core_num=48,
    )


def get_device_capability(device: Any = None) -> None:
    return None


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def is_current_stream_capturing() -> bool:
    return False


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Nothing is pending, cached or compiled here; random numbers are the host's."""


synchronize = empty_cache = manual_seed = manual_seed_all = _lazy_init = init = set_compile_mode = _do_nothing


class StreamContext:
    """In here a stream is the current one.  SGLang enters the same one again and again."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._before: list[Any] = []

    def __enter__(self) -> Any:
        self._before.append(current_stream())
        if self.stream is not None:
            set_stream(self.stream)
        return self.stream

    def __exit__(self, *why: Any) -> None:
        set_stream(self._before.pop())


def stream(new: Any) -> StreamContext:
    return StreamContext(new)


@contextlib.contextmanager
def device(new: Any) -> Iterator[None]:
    """In here `new` is the current device."""
    old = current_device()
    set_device(new)
    try:
        yield
    finally:
        set_device(old)

"""Triton's kernels by its own interpreter (TRITON_INTERPRET=1), on device memory itself.

All of it is open while they run: some follow addresses that they find in memory.
"""

from __future__ import annotations

from typing import Any

import torch


def install(interpreter: Any) -> None:
    executor = interpreter.GridExecutor
    launch = executor.__call__

    def host(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.ops.rehearsal.host_view(value)
        return tuple(map(host, value)) if isinstance(value, tuple) else value

    def to_host(self: Any, args: Any, kwargs: Any) -> Any:
        return [host(a) for a in args], {name: host(v) for name, v in kwargs.items()}

    def launch_open(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.ops.rehearsal.open_all()
        try:
            return launch(self, *args, **kwargs)
        finally:
            torch.ops.rehearsal.close_all()

    executor._init_args_hst, executor._restore_args_dev = to_host, lambda self, *args: None
    executor.__call__ = launch_open

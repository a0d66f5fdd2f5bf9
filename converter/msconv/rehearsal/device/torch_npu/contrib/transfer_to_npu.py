"""torch.cuda's names become torch.npu's, as the real one makes them: SGLang leans on it."""

from __future__ import annotations

import torch

from .. import npu

NAMES = (
    *("Event", "Stream", "current_device", "current_stream", "default_stream", "device", "device_count"),
    *("empty_cache", "get_device_name", "get_device_properties", "is_available", "manual_seed", "manual_seed_all"),
    *("max_memory_allocated", "mem_get_info", "memory_allocated", "memory_reserved", "reset_peak_memory_stats"),
    *("set_device", "stream", "synchronize"),
)

for _name in NAMES:
    setattr(torch.cuda, _name, getattr(npu, _name))
torch.Tensor.cuda = torch.Tensor.npu

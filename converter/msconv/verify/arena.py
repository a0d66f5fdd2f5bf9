"""Memory for float32 weights that is used again: pages that are new each time cost as much as the widening."""

from __future__ import annotations

from math import prod

import torch


class Arena:
    """One stretch of memory from which tensors are cut until it is used up."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._memory: torch.Tensor | None = None

    def widened(self, stored: torch.Tensor) -> torch.Tensor | None:
        """The values of `stored` in float32, valid until the next `clear`; None where there is no room."""
        count = prod(stored.shape)
        if self.used_bytes + 4 * count > self.limit_bytes:
            return None
        if self._memory is None:
            self._memory = torch.empty(self.limit_bytes // 4)  # a page is taken when it is first written
        begin = self.used_bytes // 4
        self.used_bytes += 4 * count
        return self._memory[begin : begin + count].view(stored.shape).copy_(stored)

    def clear(self) -> None:
        """What was cut is used no more."""
        self.used_bytes = 0

    def give_back(self) -> None:
        """Nothing is cut for now."""
        self.clear()
        self._memory = None

    def has(self, value: torch.Tensor) -> bool:
        """Whether a tensor lies in it."""
        memory = self._memory
        return memory is not None and value.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()

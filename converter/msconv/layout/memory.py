"""How much device memory a rank needs: weights and KV cache.  Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from msconv_runtime.dtypes import DTYPES

from .cuts import Mesh
from .model import Sizes

RESERVED = 0.1  # of a device: activations, workspace, the framework itself; not computed, kept free


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on each device for `batch` sequences of `context` tokens."""

    weight_bytes: int
    kv_bytes_per_token: int
    context: int
    batch: int

    @property
    def kv_bytes(self) -> int:
        return self.kv_bytes_per_token * self.context * self.batch

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def fits(self, device_bytes: int) -> bool:
        return self.total_bytes <= device_bytes * (1 - RESERVED)


def kv_bytes_per_token(sizes: Sizes, mesh: Mesh, dtype: str) -> int:
    """Keys and values of one token on one rank, all layers, those of a draft too.  Replicated heads count on each
    rank, and so does a latent cache, which no rank can divide."""
    layers = sizes.layers + sizes.drafts
    if latent := sizes.dims.get("latent", 0):
        return layers * latent * DTYPES[dtype].nbytes
    heads = max(1, sizes.dims["kv_heads"] // mesh.tp)
    return 2 * layers * heads * sizes.dims["head_dim"] * DTYPES[dtype].nbytes

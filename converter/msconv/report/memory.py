"""Memory of one rank, against devices.  Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msconv_runtime.artifact import Manifest
from msconv_runtime.dtypes import DTYPES
from msconv_runtime.roles import best_variant
from msconv_runtime.targets import TARGETS

from ..families import DecoderConfig
from ..layout.cuts import Mesh
from ..layout.memory import RESERVED, DeviceMemory, kv_bytes_per_token
from .groups import KV_CACHE, ORDER, group_of

CONTEXT, LONG_CONTEXT = 4096, 32768
REQUESTS = (1, 8, 32)  # at a time
AS_STORED = "as stored"

Data = dict[str, Any]


def memory(manifest: Manifest, config: DecoderConfig, mesh: Mesh, targets: list[str]) -> Data:
    """What each target's graphs need of a device; what is stored, where no target has devices."""
    context = min(CONTEXT, config.max_positions)
    entries = []
    for target in targets:
        graphs = best_variant(manifest.graphs_for(target))
        sizes = {p.name: _nbytes(p.shape, p.dtype) for g in graphs for p in g.reads}
        entries.append(_memory_of(target, graphs[0].caches[0].dtype, sizes, config, mesh, context))
    if manifest.weights and not any(TARGETS[t].devices for t in targets if t in TARGETS):
        w = manifest.weights
        entries.append(
            _memory_of(AS_STORED, w.dtype, {t.name: t.nbytes for t in w.tensors}, config, mesh, context)
        )
    return {"context": context, "sequences": 1, "reserved": RESERVED, "targets": entries}


def _memory_of(
    target: str, dtype: str, sizes: Mapping[str, int], config: DecoderConfig, mesh: Mesh, context: int
) -> Data:
    """One rank's memory for a target, by group, with a cache of `dtype`, and the devices it could be.  All ranks
    need the same."""
    per_token = kv_bytes_per_token(config.sizes(), mesh, dtype)
    need = DeviceMemory(sum(sizes.values()), per_token, context, 1)
    by_group: dict[str, int] = {KV_CACHE: need.kv_bytes}
    for name, size in sizes.items():
        by_group[group_of(name)] = by_group.get(group_of(name), 0) + size
    groups = [
        {"group": g, "bytes": by_group[g], "share": share(by_group[g], need.total_bytes)}
        for g in ORDER
        if g in by_group
    ]
    devices = [
        {
            "name": d.name,
            "memory_bytes": d.memory_bytes,
            "share": share(need.total_bytes, d.memory_bytes),
            "fits": need.fits(d.memory_bytes),
            "tokens": max(0, int(d.memory_bytes * (1 - RESERVED)) - need.weight_bytes) // per_token,
        }
        for t in TARGETS.values()
        for d in t.devices
        if target in (t.name, AS_STORED)
    ]
    return {
        "target": target,
        "dtype": dtype,
        "groups": groups,
        "weight_bytes": need.weight_bytes,
        "kv_bytes_per_token": per_token,
        "kv_bytes": need.kv_bytes,
        "total_bytes": need.total_bytes,
        "devices": devices,
        "loads": _loads(need.weight_bytes, per_token, context, config.max_positions, devices),
    }


def _loads(weight_bytes: int, per_token: int, context: int, max_positions: int, devices: list[Data]) -> list[Data]:
    """What so many requests of so many tokens take, and which devices they fit: a table to choose from."""
    contexts = sorted({context, min(LONG_CONTEXT, max_positions)})
    loads = [DeviceMemory(weight_bytes, per_token, c, n) for c in contexts for n in REQUESTS]
    return [
        {
            "requests": load.batch,
            "context": load.context,
            "total_bytes": load.total_bytes,
            "fits": ["fits" if load.fits(d["memory_bytes"]) else "does not fit" for d in devices],
        }
        for load in loads
        if devices
    ]


def _nbytes(shape: list[int], dtype: str) -> int:
    size = DTYPES[dtype].nbytes
    for n in shape:
        size *= n
    return size


def share(part: int, whole: int) -> float:
    """0 of nothing."""
    return float(f"{part / whole:.6g}") if whole else 0.0

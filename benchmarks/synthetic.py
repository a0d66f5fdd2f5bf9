"""Checkpoints of real shapes and random bytes, for measuring: no real weights are needed to move bytes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from msconv.families import configure
from msconv.layout import dtypes
from msconv.layout.model import expected_sources

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
SHARD_BYTES = 4_900_000_000  # as the published checkpoints are split
BLOCK = 64 << 20


def write_checkpoint(directory: Path, model: str, layers: int) -> int:
    """Write `model` (a published configuration's name) cut down to some layers.  Returns its bytes."""
    raw = json.loads((CONFIGS / f"{model}.json").read_text())
    raw["num_hidden_layers"] = layers
    family, config = configure(raw, model)
    dtype = raw.get("torch_dtype", "bfloat16")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    shards: list[dict[str, object]] = [{}]
    sizes = [0]
    for name, info in expected_sources(family.table, config.sizes(), dtype).items():
        nbytes = dtypes.SIZES[info.dtype]
        for n in info.shape:
            nbytes *= n
        if sizes[-1] and sizes[-1] + nbytes > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = {
            "dtype": dtypes.CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [sizes[-1], sizes[-1] + nbytes],
        }
        sizes[-1] += nbytes
    noise = os.urandom(BLOCK)
    weight_map: dict[str, str] = {}
    for i, (header, size) in enumerate(zip(shards, sizes, strict=True), 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(header, name)
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            left, turn = size, i
            while left:
                n = min(left, BLOCK)
                f.write(noise[turn : turn + n] if turn + n <= BLOCK else (noise[turn:] + noise)[:n])
                left, turn = left - n, (turn * 7919) % (BLOCK // 2)
            f.flush()
            os.fsync(f.fileno())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes)

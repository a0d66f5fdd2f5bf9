"""Checkpoints of real shapes and random values: no real weights are needed to move bytes, or to prove graphs.

    python benchmarks/synthetic.py --model DeepSeek-V3 --layers 4 --experts 32 --output /some/disk/deepseek

Models of mixed layers keep at least one of each kind: DeepSeek-V3 with 1 layer has a layer of experts, with 4 its
three dense layers before it.  Published FP8 checkpoints come as FP8 with their scales.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))
from msconv.families import configure
from msconv.layout.model import expected_sources
from msconv_runtime.dtypes import DTYPES

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
SHARD_BYTES = 4_900_000_000  # as the published checkpoints are split
BLOCK = 64 << 20
ADDS = re.compile(r"\.(?:o_proj|down_proj)\.")  # brings what was computed into the residual stream

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def configuration(model: str, layers: int, experts: int = 0) -> dict[str, Any]:
    """A published configuration with fewer layers and, if asked, fewer experts."""
    raw: dict[str, Any] = json.loads((CONFIGS / f"{model}.json").read_text())
    raw["num_hidden_layers"] = layers
    if "first_k_dense_replace" in raw:
        raw["first_k_dense_replace"] = min(raw["first_k_dense_replace"], layers - 1)
        raw["num_nextn_predict_layers"] = 0
    if experts:
        raw["n_routed_experts" if "n_routed_experts" in raw else "num_experts"] = experts
    return raw


def tensors(raw: dict[str, Any], model: str) -> Shapes:
    """(element type, shape) by name, FP8 and scales as published."""
    family, config = configure(raw, model)
    dtype = raw.get("torch_dtype", "bfloat16")
    expected = expected_sources(family.table, config.sizes(), dtype, quantised=True)
    return {name: (info.dtype, info.shape) for name, info in expected.items()}


def write_checkpoint(directory: Path, model: str, layers: int, experts: int = 0, repeats: bool = False) -> int:
    """Write `model` (a published configuration's name) cut down.  Returns its bytes.  `repeats`: layers run and
    add nothing, so that the model says its last token again and again, and a copy of its first layers too."""
    raw = configuration(model, layers, experts)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    shards: list[dict[str, dict[str, Any]]] = [{}]
    sizes = [0]
    for name, (dtype, shape) in tensors(raw, model).items():
        nbytes = DTYPES[dtype].nbytes * math.prod(shape)
        if sizes[-1] and sizes[-1] + nbytes > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        offsets = [sizes[-1], sizes[-1] + nbytes]
        shards[-1][name] = {"dtype": DTYPES[dtype].code, "shape": list(shape), "data_offsets": offsets}
        sizes[-1] += nbytes
    noise = Noise()
    weight_map: dict[str, str] = {}
    for i, header in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(header, name)
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for tensor, entry in header.items():
                begin, end = entry["data_offsets"]
                for piece in noise.pieces(tensor, entry["dtype"], end - begin):
                    f.write(bytes(len(piece)) if repeats and ADDS.search(tensor) else piece)
            f.flush()
            os.fsync(f.fileno())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes)


class Noise:
    """Random values of a size that keeps activations finite: matrices about 0.02, norms about 1."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        normal = rng.standard_normal(BLOCK // 4, np.float32)
        codes = rng.integers(0, 256, BLOCK, np.uint8)
        codes[(codes & 0x7F) >= 0x70] &= 0x8F  # neither NaN nor the few largest values
        self.turn = 0
        self.blocks: dict[str, NDArray[np.uint8]] = {
            "matrix": (np.tile(normal, 2) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint8),
            "norm": (1 + 0.1 * normal[: 1 << 20]).astype(ml_dtypes.bfloat16).view(np.uint8),
            "F8_E4M3": codes,
            "F32": (normal[: 1 << 20] * 0.05).view(np.uint8),
            "scale": (np.abs(normal[: 1 << 20]) * 1e-4 + 5e-4).view(np.uint8),
        }

    def pieces(self, name: str, code: str, size: int) -> Iterator[memoryview]:
        """`size` bytes for a tensor, beginning at another place of the noise each time."""
        kind = "norm" if "norm" in name else "scale" if name.endswith("_scale_inv") else code
        block = self.blocks.get(kind, self.blocks["matrix"])
        while size:
            self.turn = (self.turn * 7919 + 1) % 65521
            begin = self.turn * 64 % (len(block) // 2)
            piece = block[begin : begin + size]
            size -= len(piece)
            yield piece.data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=", ".join(sorted(p.stem for p in CONFIGS.glob("*.json"))))
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--experts", type=int, default=0, help="routed experts a layer  [default: all]")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    size = write_checkpoint(args.output, args.model, args.layers, args.experts)
    print(f"{args.output}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

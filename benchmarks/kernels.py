"""The compiled kernels alone: products with bfloat16 weights and with int8 weights, alternated.

    python benchmarks/kernels.py --rounds 9 --json FILE

Shapes are those of Qwen3-0.6B's layers, and of Qwen3-30B-A3B's experts (64 of the 128).  All layers together are
larger than a cache, as they are when a model runs.  Seconds are the processors' time by default, which other
programs disturb least; `--wall` takes the clock's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from msconv_runtime.kernels import library
from msconv_runtime.kernels.check import Array, prepare

LAYERS = 6
MATRICES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))  # qkv, o, gate and up, down
EXPERTS, HIDDEN, FFN, TOP_K = 64, 2048, 768, 8
Runs = list[Callable[[], None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,256")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = library().path
    if path is None:
        sys.exit(f"no kernels: {library().why}")
    ctypes.CDLL(str(path)).Threads(ctypes.c_int64(args.threads))
    clock = time.perf_counter if args.wall else time.process_time
    report: dict[str, dict[str, float]] = {}
    for title, make in (("layers", Products(path)), ("experts", Grouped(path))):
        for rows in map(int, args.rows.split(",")):
            ways = make(rows)
            seconds = [[timed(runs, clock) for runs in ways] for _ in range(args.rounds)]
            found = {
                "bfloat16_s": statistics.median(s[0] for s in seconds),
                "int8_s": statistics.median(s[1] for s in seconds),
                "ratio": statistics.median(s[0] / s[1] for s in seconds),
            }
            report[f"{title}, {rows} rows"] = found
            times = f"bfloat16 {found['bfloat16_s'] * 1e3:.2f} ms, int8 {found['int8_s'] * 1e3:.2f} ms"
            print(f"{title}, {rows} rows: {times}; int8 is {found['ratio']:.2f}x as fast", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def timed(runs: Runs, clock: Callable[[], float]) -> float:
    started = clock()
    for run in runs:
        run()
    return clock() - started


def bfloat16(rng: np.random.Generator, *shape: int) -> Array:
    """Bits of values between 2**-7 and 2**-5, of both signs."""
    return rng.integers(0x3C00, 0x3D00, shape, np.uint16) | (rng.integers(0, 2, shape, np.uint16) << 15)


class Products:
    """All products of some layers."""

    def __init__(self, path: Path) -> None:
        self.path, self.rng = path, np.random.default_rng(0)
        shapes = [shape for _ in range(LAYERS) for shape in MATRICES]
        self.values = [bfloat16(self.rng, *shape) for shape in shapes]
        self.codes = [self.rng.integers(-127, 128, shape, np.int8) for shape in shapes]
        self.scales = [np.full((shape[0], 1), 1e-4, np.float32) for shape in shapes]

    def __call__(self, rows: int) -> tuple[Runs, Runs]:
        ways: tuple[Runs, Runs] = ([], [])
        for value, code, scale in zip(self.values, self.codes, self.scales, strict=True):
            x = self.rng.standard_normal((rows, value.shape[1]), np.float32)
            y = np.empty((rows, len(value)), np.float32)
            ways[0].append(prepare(self.path, "Product", [x, value, y]))
            ways[1].append(prepare(self.path, "ProductInt8", [x, code, scale, y]))
        return ways


class Grouped:
    """One layer's experts, other ones each time."""

    def __init__(self, path: Path) -> None:
        self.path, self.rng = path, np.random.default_rng(0)
        shapes = (EXPERTS, HIDDEN, 2 * FFN), (EXPERTS, FFN, HIDDEN)
        self.values = [bfloat16(self.rng, *shape) for shape in shapes]
        self.codes: list[Any] = []
        for shape in shapes:
            self.codes.append(self.rng.integers(-127, 128, shape, np.int8))
            self.codes.append(np.full((EXPERTS, 1, shape[2]), 1e-4, np.float32))

    def __call__(self, rows: int) -> tuple[Runs, Runs]:
        ways: tuple[Runs, Runs] = ([], [])
        for _ in range(max(1, 8 // rows)):
            x = self.rng.standard_normal((rows, HIDDEN), np.float32)
            ids = np.stack([self.rng.permutation(EXPERTS)[:TOP_K] for _ in range(rows)]).astype(np.int32)
            routed = [x, np.full((rows, TOP_K), 0.1, np.float32), ids, np.zeros(1, np.int32)]
            y = np.empty((rows, HIDDEN), np.float32)
            ways[0].append(prepare(self.path, "Experts", [*routed, *self.values, y]))
            ways[1].append(prepare(self.path, "ExpertsInt8", [*routed, *self.codes, y]))
        return ways


if __name__ == "__main__":
    main()

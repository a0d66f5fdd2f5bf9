"""How near the compiled kernels come to what the machine can do: products of a prompt, and one request's tokens.

    python benchmarks/bounds.py --rows 1024 --layers 28 --json FILE

Prompts: products and attention of a layer of Qwen3-0.6B, alternated with torch's in float32 and bfloat16, one
thread and the processor's own time.  Tokens: a `Session` with an artifact of that shape and random values decodes
one request; the bytes of its weights a second, and with those of its caches, as a share of what reading memory
alone gives in the same run, by all processors.  Without `--layers` only prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.kernels import MATRICES, bfloat16
from benchmarks.synthetic import write_checkpoint
from msconv_runtime.kernels import library, processors_allowed
from msconv_runtime.kernels.check import prepare

HEADS, KV_HEADS, DIM = 16, 8, 128
MODEL = "Qwen3-0.6B"
READ_BYTES = 1 << 30
Ways = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument(
        "--layers", type=int, default=0, help="of the artifact that decodes; 28 is the whole model"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = library().path
    if path is None:
        sys.exit(f"no kernels: {library().why}")
    report: dict[str, Any] = {"variant": library().variant, "prompt": prompt(path, args.rows, args.rounds)}
    if args.layers:
        report["token"] = token(args.layers, args.context, args.tokens, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def prompt(path: Path, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """10^9 operations a second by way, and ratios to torch in float32."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    products: dict[str, list[Callable[[], Any]]] = {"msconv": [], "torch float32": [], "torch bfloat16": []}
    for width, depth in MATRICES:
        bits, x = bfloat16(rng, width, depth), rng.standard_normal((rows, depth), np.float32)
        y = np.empty((rows, width), np.float32)
        a = torch.from_numpy(x)
        b = torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)).T
        products["msconv"].append(prepare(path, "Product", [x, bits, y]))
        products["torch float32"].append(partial(torch.matmul, a, b))
        products["torch bfloat16"].append(partial(torch.matmul, a.bfloat16(), b.bfloat16()))
    work = sum(2 * rows * width * depth for width, depth in MATRICES)
    found = {
        "products": compare({name: all_of(runs) for name, runs in products.items()}, work, rounds),
        "attention": compare(attention(path, rng, rows), 2 * rows * rows * HEADS * DIM, rounds),
    }
    for title, speeds in found.items():
        shown = ", ".join(f"{name} {value:.1f}" for name, value in speeds.items())
        print(f"{title} of {rows} tokens, 10^9 operations a second of a processor: {shown}", flush=True)
    return found


def all_of(runs: list[Callable[[], Any]]) -> Callable[[], None]:
    return lambda: [run() for run in runs] and None


def attention(path: Path, rng: np.random.Generator, rows: int) -> Ways:
    """One sequence, causal: half of all pairs."""
    import torch

    q = rng.standard_normal((rows, HEADS, DIM), np.float32) / np.float32(DIM**0.5)
    k, v = (rng.standard_normal((rows, 1, KV_HEADS, DIM), np.float32) for _ in range(2))
    table, count = rng.permutation(rows).astype(np.int32)[None], np.array([rows], np.int32)
    out = np.empty((rows, HEADS * DIM), np.float32)
    a = torch.from_numpy(q).transpose(0, 1)[None]
    b, c = (
        torch.from_numpy(x[:, 0]).transpose(0, 1)[None].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)
    )
    theirs = torch.nn.functional.scaled_dot_product_attention
    return {
        "msconv": prepare(path, "Attend", [q, k, v, table, count, count, out]),
        "torch float32": lambda: theirs(a, b, c, is_causal=True, scale=1.0),
    }


def compare(ways: Ways, operations: int, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    found = {name: operations / min(taken) / 1e9 for name, taken in seconds.items()}
    found["ratio to torch float32"] = found["msconv"] / found["torch float32"]
    return found


def token(layers: int, context: int, tokens: int, rounds: int) -> dict[str, float]:
    """One request's tokens a second, and the share of the bandwidth that reading all weights so often takes."""
    from msconv.location import LocalDirectory
    from msconv.steps.compile import compile_graphs
    from msconv.steps.conversion import run
    from msconv.steps.convert import prepare as plan
    from msconv_runtime import Session

    with tempfile.TemporaryDirectory() as place:
        source, artifact = Path(place) / "source", Path(place) / "artifact"
        weights = write_checkpoint(source, MODEL, layers)
        run(plan(LocalDirectory(source), 1, 1, output=artifact), False)
        compile_graphs(artifact, "cpu")
        session, reader = Session(artifact), Reader(processors_allowed())
        session.generate([list(range(context))], 2)
        shares, speeds = [], []
        for _ in range(rounds):
            bandwidth = reader.speed()
            session.prefill([list(range(context))])
            started = time.perf_counter()
            for i in range(tokens):
                session.decode([i])
            seconds = (time.perf_counter() - started) / tokens
            speeds.append(1 / seconds)
            shares.append(1 / seconds / bandwidth)
    share, speed = statistics.median(shares), statistics.median(speeds)
    cached = layers * 2 * KV_HEADS * DIM * 4 * (context + (tokens + 1) // 2)  # float32, by half of the tokens
    by_weights, by_all = share * weights, share * (weights + cached)
    print(
        f"one request, context {context}, {layers} layers: {speed:.1f} tokens/s; of the bandwidth "
        f"{by_weights:.2f} by weights, {by_all:.2f} with the caches"
    )
    return {
        "tokens_per_s": speed,
        "share_of_bandwidth": by_weights,
        "share_with_caches": by_all,
        "weight_bytes": weights,
        "cache_bytes": cached,
    }


class Reader:
    """Reads memory that no cache holds, on all processors at once."""

    def __init__(self, threads: int) -> None:
        self.parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
        self.pool = ThreadPoolExecutor(threads)

    def speed(self) -> float:
        """Bytes a second, the best of three."""
        best = 0.0
        for _ in range(3):
            started = time.perf_counter()
            list(self.pool.map(np.max, self.parts))
            best = max(best, READ_BYTES / (time.perf_counter() - started))
        return best


if __name__ == "__main__":
    main()

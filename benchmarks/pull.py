"""Converting while downloading against downloading alone, from a hub on localhost of a fixed rate; empty caches.

    python benchmarks/pull.py --model Qwen3-0.6B --layers 28 --rate 100 --repeat 5 --work /some/disk

Downloading alone is huggingface_hub's snapshot_download of the same files with as many connections.  Each round
runs both, in turn; medians, their ratio, and the bytes that came are printed, and JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import synthetic
from msconv_runtime.dtypes import DTYPES
from tests.hub.server import Hub, sha256

NAME = "some/model"
SHARDS = 10  # about: a large embedding takes one
ALONE = f"""
from huggingface_hub import snapshot_download
from msconv.checkpoint.downloads import AT_ONCE
snapshot_download("{NAME}", allow_patterns=["*.safetensors", "*.json"], max_workers=AT_ONCE)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rate", type=float, default=100, help="of the hub, all connections together, in MB/s")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmark"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    source, target, home = args.work / "source", args.work / "target", args.work / "home"
    raw = synthetic.configuration(args.model, args.layers)
    shapes = synthetic.tensors(raw, args.model).values()
    total = sum(DTYPES[dtype].nbytes * math.prod(shape) for dtype, shape in shapes)
    synthetic.SHARD_BYTES = -(-total // SHARDS)
    size = synthetic.write_checkpoint(source, args.model, args.layers)
    for path in source.glob("*.safetensors"):
        sha256(path)
    shards = len(list(source.glob("*.safetensors")))
    print(
        f"{args.model}, {args.layers} layers: {size / 1e9:.2f} GB in {shards} shards, "
        f"{args.rate:.0f} MB/s; {platform.machine()}, {os.cpu_count()} cores"
    )
    convert = ["-m", "msconv", "convert", "--model", NAME, "--tp", str(args.tp), "--output", str(target)]
    ways = {"download alone": ["-c", ALONE], "convert": convert}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    hub = Hub()
    try:
        hub.add(NAME, source)
        hub.bytes_per_second = args.rate * 1e6
        environment = {**os.environ, **hub.environment(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for round_number in range(args.repeat):
            for way, command in ways.items():
                shutil.rmtree(home, ignore_errors=True)
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
                hub.reset()
                started = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *command], env=environment, capture_output=True, check=False
                )
                if done.returncode:
                    sys.exit(f"{way} failed:\n{done.stderr.decode()}")
                seconds[way].append(time.perf_counter() - started)
                came = sum(hub.served.values()) / size
                print(
                    f"round {round_number + 1}: {way} {seconds[way][-1]:.2f} s, {came:.3f} of the bytes came",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        hub.stop()
        shutil.rmtree(args.work)
    median = {way: statistics.median(found) for way, found in seconds.items()}
    ratio = median["convert"] / median["download alone"]
    for way, found in median.items():
        print(f"{way:15} {found:7.2f} s  {size / found / 1e6:7.1f} MB/s")
    print(f"converting while downloading takes {ratio:.3f} of downloading alone")
    if args.json:
        data = {"model": args.model, "layers": args.layers, "tp": args.tp, "bytes": size, "rate": args.rate * 1e6}
        data |= {"cores": os.cpu_count(), "seconds": seconds, "median_seconds": median, "ratio": ratio}
        args.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()

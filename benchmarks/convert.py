"""`msconv convert` against cp, a copy loop with the same system calls, and the naive way; cold cache.

    python benchmarks/convert.py --model Qwen3-8B --layers 6 --tp 4 --repeat 5 --work /some/disk

    python benchmarks/convert.py --model DeepSeek-V3 --layers 1 --tp 16 --ep 16 --ways msconv,"copy output"

"copy output" copies what msconv wrote just before, with the same system calls: the floor where a conversion
writes more than it reads.  Each round runs every way once, in turn; medians and ratios of medians are printed,
and JSON with --json FILE.  Writing is counted until the data is on the disk for all of them but `cp`, which is
shown with and without `sync`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.synthetic import write_checkpoint

HERE = Path(__file__)
WAYS = ("cp", "copy loop", "naive", "msconv")


@dataclass
class Run:
    seconds: float
    cpu_seconds: float
    anonymous_bytes: int
    rss_bytes: int
    synced_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=0, help="routed experts a layer  [default: all]")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--quant", help="as of `msconv convert`; `copy output` copies what that writes")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmark"))
    parser.add_argument("--ways", default=",".join(WAYS), help="which to run, comma-separated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint afterwards")
    args = parser.parse_args()
    source, target, copied = args.work / "source", args.work / "target", args.work / "copied"
    shutil.rmtree(args.work, ignore_errors=True)
    size = write_checkpoint(source, args.model, args.layers, args.experts)
    print(f"{args.model}, {args.layers} layers: {size / 1e9:.2f} GB; {platform.machine()}, {os.cpu_count()} cores")
    convert = [sys.executable, "-m", "msconv", "convert", "--model", source, "--tp", args.tp, "--ep", args.ep]
    convert += ["--output", target, *(["--jobs", args.jobs] if args.jobs else [])]
    convert += ["--quant", args.quant] if args.quant else []
    commands = {
        "cp": ["cp", "-r", source, target],
        "copy loop": [sys.executable, HERE.with_name("copy_loop.py"), source, target],
        "naive": [sys.executable, HERE.with_name("naive.py"), source, target, args.tp],
        "msconv": convert,
        "copy output": [sys.executable, HERE.with_name("copy_loop.py"), target / "weights", copied],
    }
    runs: dict[str, list[Run]] = {way: [] for way in args.ways.split(",")}
    for round_number in range(args.repeat):
        for way in runs:
            if way != "copy output":
                shutil.rmtree(target, ignore_errors=True)
            drop_cache(source if way != "copy output" else target / "weights")
            runs[way].append(measure([str(c) for c in commands[way]], args.work))
            print(f"round {round_number + 1}: {way} {runs[way][-1].seconds:.2f} s", file=sys.stderr, flush=True)
        shutil.rmtree(copied, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    if not args.keep:
        shutil.rmtree(source)
    report(runs, size, args)


def measure(command: list[str], target: Path) -> Run:
    """Run to the end, watching the memory of the process and its children."""
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [0, 0]
    watching = threading.Event()

    def watch() -> None:
        while not watching.is_set():
            found = [memory(pid) for pid in tree(process.pid)]
            for i in (0, 1):
                peaks[i] = max(peaks[i], sum(f[i] for f in found))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    watching.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{command} failed:\n{errors.decode()}")
    subprocess.run(["sync", "-f", target], check=True)
    synced = time.perf_counter() - started
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, cpu, peaks[0], peaks[1], synced)


def tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for c in children for p in tree(int(c)))]


def memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "VmRSS"))
    }
    return found.get("RssAnon", 0), found.get("VmRSS", 0)


def drop_cache(directory: Path) -> None:
    os.sync()
    for path in directory.iterdir():
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(runs: dict[str, list[Run]], size: int, args: argparse.Namespace) -> None:
    median = {way: statistics.median(r.seconds for r in found) for way, found in runs.items()}
    synced = {way: statistics.median(r.synced_seconds for r in found) for way, found in runs.items()}
    print(
        f"{'way':10} {'s':>7} {'synced':>7} {'GB/s':>6} {'CPU s':>6} {'anon MiB':>9} {'RSS MiB':>8}   msconv takes"
    )
    for way, found in runs.items():
        ratio = f"{median['msconv'] / median[way]:.2f}x" if "msconv" in median else ""
        print(
            f"{way:10} {median[way]:7.2f} {synced[way]:7.2f} {size / median[way] / 1e9:6.2f} "
            f"{statistics.median(r.cpu_seconds for r in found):6.2f} "
            f"{max(r.anonymous_bytes for r in found) / 2**20:9.1f} "
            f"{max(r.rss_bytes for r in found) / 2**20:8.1f}   {ratio}"
        )
    if args.json:
        data = {
            "model": args.model,
            "layers": args.layers,
            "tp": args.tp,
            "quant": args.quant,
            "bytes": size,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "runs": {way: [asdict(r) for r in found] for way, found in runs.items()},
            "median_seconds": median,
        }
        args.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()

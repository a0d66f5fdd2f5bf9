"""What `msconv plan --predict` says, and what then happens: time, bytes and memory, of bfloat16, FP8 and int8.

    python benchmarks/predict.py --work /some/disk
    python benchmarks/predict.py --cases bf16 --size 0.2 --repeat 1     a quick look

Each case writes a synthetic checkpoint, and each round predicts and converts it, cold.  Memory is what the process
says of itself at its end; a prediction is a ceiling, which may not be passed.  Times mean something only on a
machine that does nothing else.
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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.convert import drop_cache
from benchmarks.synthetic import write_checkpoint

WITHIN = 0.25


@dataclass(frozen=True)
class Case:
    """`layers`, `experts` of a published model at --size 1."""

    model: str
    layers: int
    experts: int
    tp: int
    ep: int
    quant: str = ""


CASES = {
    "bf16": Case("Qwen3-8B", 6, 0, 4, 1),
    "fp8": Case("DeepSeek-V3", 2, 64, 8, 8),
    "int8": Case("Qwen3-8B", 6, 0, 4, 1, "w8a8"),
    "fp8 to int8": Case("DeepSeek-V3", 2, 64, 8, 8, "w8a8"),
}


def msconv(*args: object) -> tuple[dict[str, Any], float]:
    """What a command says as JSON, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "msconv", *map(str, args), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout), time.perf_counter() - started


def round_of(case: Case, source: Path, target: Path) -> dict[str, tuple[float, float]]:
    """(predicted, measured) of one prediction and the conversion after it."""
    shutil.rmtree(target, ignore_errors=True)
    layout = ["--model", source, "--tp", case.tp, "--ep", case.ep, "--output", target]
    layout += ["--quant", case.quant] if case.quant else []
    said, _ = msconv("plan", *layout, "--predict")
    drop_cache(source)
    done, seconds = msconv("convert", *layout)
    size = sum(f.stat().st_size for f in (target / "weights").iterdir())
    return {
        "seconds": (said["seconds"], seconds),
        "bytes read": (said["source_bytes"], done["bytes_read"]),
        "bytes written": (said["output_bytes"], size),
        "peak memory": (said["peak_memory_bytes"], done["peak_rss_bytes"]),
    }


def verdict(name: str, predicted: float, measured: float) -> str:
    """Whether a prediction holds: bytes exactly, memory as a ceiling, time within a quarter."""
    if name.startswith("bytes"):
        return "" if predicted == measured else "NOT EQUAL"
    if name == "peak memory":
        return "" if measured <= predicted else "ABOVE"
    return "" if abs(predicted / measured - 1) <= WITHIN else "APART"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="which to run, comma-separated")
    parser.add_argument("--size", type=float, default=1.0, help="of the number of layers and experts")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("artifacts/predict"))
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'case':12} {'what':14} {'predicted':>16} {'measured':>16} {'ratio':>6}")
    wrong = False
    for name in args.cases.split(","):
        case = CASES[name]
        source, target = args.work / "source", args.work / "target"
        shutil.rmtree(args.work, ignore_errors=True)
        experts = max(8, round(case.experts * args.size / 8) * 8) if case.experts else 0
        write_checkpoint(source, case.model, max(2, round(case.layers * args.size)), experts)
        rounds = [round_of(case, source, target) for _ in range(args.repeat)]
        for what in rounds[0]:
            predicted, measured = (statistics.median(r[what][i] for r in rounds) for i in (0, 1))
            said = verdict(what, predicted, measured)
            wrong |= bool(said)
            form = ",.2f" if what == "seconds" else ",.0f"
            numbers = f"{predicted:>16{form}} {measured:>16{form}} {predicted / measured:6.2f}"
            print(f"{name:12} {what:14} {numbers} {said}", flush=True)
        shutil.rmtree(args.work, ignore_errors=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()

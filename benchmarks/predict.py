"""What `msconv plan --predict` says, and what then happens: time, bytes and memory, of conversions of bfloat16,
FP8 and int8, of a proof, and of a download from a hub on this machine.

    python benchmarks/predict.py --work /some/disk
    python benchmarks/predict.py --cases bf16 --size 0.2 --repeat 1     a quick look

Each case writes a synthetic checkpoint, and each round predicts and does it, cold.  Memory is what the process
says of itself at its end, of a proof the most that it had besides pages of files; a prediction is a ceiling, which
may not be passed.  Times mean something only on a machine that does nothing else.
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
from tests.hub.server import Hub

WITHIN = 0.25
BRING = """
import sys, time
from msconv.location import open_reference
from msconv.process import peak_rss_bytes
started = time.perf_counter()
open_reference(sys.argv[1]).bring()
print(time.perf_counter() - started, peak_rss_bytes())
"""


@dataclass(frozen=True)
class Case:
    """`layers`, `experts` of a published model at --size 1."""

    model: str
    layers: int
    experts: int
    tp: int
    ep: int
    quant: str = ""
    target: str = ""  # whose proof is predicted
    is_remote: bool = False  # its download is


CASES = {
    "bf16": Case("Qwen3-8B", 6, 0, 4, 1),
    "fp8": Case("DeepSeek-V3", 2, 64, 8, 8),
    "int8": Case("Qwen3-8B", 6, 0, 4, 1, "w8a8"),
    "fp8 to int8": Case("DeepSeek-V3", 2, 64, 8, 8, "w8a8"),
    "verify": Case("Qwen3-4B", 8, 0, 4, 1, target="ascend910b"),
    "download": Case("Qwen3-4B", 4, 0, 4, 1, is_remote=True),
}


def msconv(*args: object, environment: dict[str, str] | None = None) -> tuple[dict[str, Any], float]:
    """What a command says as JSON, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "msconv", *map(str, args), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
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


def proof_of(case: Case, source: Path, target: Path) -> dict[str, tuple[float, float]]:
    """The same of a proof.  The artifact is made before, and is not in memory."""
    shutil.rmtree(target, ignore_errors=True)
    layout = ["--model", source, "--tp", case.tp, "--ep", case.ep, "--output", target]
    said, _ = msconv("plan", *layout, "--predict", "--target", case.target)
    msconv("convert", *layout)
    msconv("compile", target, "--target", case.target)
    drop_cache(source)
    drop_cache(target / "weights")
    (foreseen,) = said["verify"]
    if foreseen["why_not"]:
        sys.exit(foreseen["why_not"])
    command = [sys.executable, "-m", "msconv", "verify", str(target), "--target", case.target, "--json"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        most, read = watched(process)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed.")
    return {
        "seconds": (foreseen["seconds"], time.perf_counter() - started),
        "read": (foreseen["read_bytes"], read),
        "peak memory": (foreseen["peak_memory_bytes"], most),
    }


def watched(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """(most bytes that the process had besides pages of files, bytes that it read from disks), at its end."""
    place, most, read = Path(f"/proc/{process.pid}"), 0, 0
    while process.poll() is None:
        time.sleep(0.1)
        try:
            status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
            counts = dict(line.split(": ") for line in (place / "io").read_text().splitlines())
        except (OSError, ValueError):
            continue
        most = max(most, int(status.get("RssAnon", "0 kB").split()[0]) * 1024)
        read = int(counts.get("read_bytes", read))
    return most, read


def download_of(case: Case, source: Path, target: Path) -> dict[str, tuple[float, float]]:
    """The same of a download."""
    hub, name = Hub(), "some/model"
    hub.add(name, source)
    shutil.rmtree(target, ignore_errors=True)
    environment = {**os.environ, **hub.environment(target)}
    try:
        layout = ["--model", name, "--tp", case.tp, "--ep", case.ep]
        said, _ = msconv("plan", *layout, "--predict", environment=environment)
        command = [sys.executable, "-c", BRING, name]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    finally:
        hub.stop()
    if done.returncode:
        sys.exit(done.stderr)
    seconds, memory = map(float, done.stdout.split())
    size = sum(f.stat().st_size for f in target.rglob("snapshots/*/*.safetensors"))
    return {
        "seconds": (said["download"]["seconds"], seconds),
        "bytes": (said["download"]["read_bytes"], size),
        "peak memory": (said["download"]["peak_memory_bytes"], memory),
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
        a_round = proof_of if case.target else download_of if case.is_remote else round_of
        rounds = [a_round(case, source, target) for _ in range(args.repeat)]
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

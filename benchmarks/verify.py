"""The proof at real shapes: this code and an earlier commit's on the same artifact, alternated.

    python benchmarks/verify.py --model Qwen3-8B --layers 4 --tp 4 --rounds 3 --json FILE
    python benchmarks/verify.py --model Qwen3-8B --layers 36 --tp 4 --rounds 1 --against ""

Makes a checkpoint with random values, converts and compiles it with the earlier commit, whose artifacts this code
reads, and verifies it by each in a process of its own.  Prints medians: seconds, the processors' seconds (which
other programs disturb least), both per 10^9 bytes of weights, and peak memory.  Files need twice the model's size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.synthetic import write_checkpoint

HERE = Path(__file__).resolve().parent.parent

PROVE = """
import json, resource, sys, time
from pathlib import Path
from msconv.verify.prove import prove
started = time.perf_counter()
proof = prove(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
used = resource.getrusage(resource.RUSAGE_SELF)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "cpu_seconds": used.ru_utime + used.ru_stime,
    "peak_rss_gib": used.ru_maxrss / 2**20,
    "ok": proof.ok,
    "error": proof.comparison.max_abs_logit_error,
    "rows": proof.comparison.rows + proof.comparison.ties,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=0, help="routed experts a layer  [default: all]")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--target", default="ascend910b")
    parser.add_argument("--against", default="07fe90e", help='an earlier commit; "" for none')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where files are made  [default: a temporary one]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.directory:
        args.directory.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="msconv-verify-", dir=args.directory))
    trees = {"now": HERE}
    try:
        if args.against:
            trees["before"] = work / "before"
            git("worktree", "add", "--detach", str(trees["before"]), args.against)
        size = make(work, trees.get("before", HERE), args)
        report = measured(work, trees, size, args)
    finally:
        if "before" in trees:
            git("worktree", "remove", "--force", str(trees["before"]))
        shutil.rmtree(work, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def make(work: Path, tree: Path, args: argparse.Namespace) -> float:
    """Checkpoint and artifact.  The artifact's weights in 10^9 bytes."""
    write_checkpoint(work / "model", args.model, args.layers, args.experts)
    layout = ["--tp", str(args.tp)] + (["--ep", str(args.ep)] if args.ep > 1 else [])
    msconv(tree, "convert", "--model", str(work / "model"), *layout, "--output", str(work / "artifact"))
    msconv(tree, "compile", str(work / "artifact"), "--target", args.target)
    return sum(p.stat().st_size for p in (work / "artifact").rglob("*.safetensors")) / 1e9


def measured(work: Path, trees: dict[str, Path], size: float, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and what their medians are."""
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in trees}
    for number in range(args.rounds):
        for way in list(trees) if number % 2 == 0 else list(trees)[::-1]:
            found = proved(work, trees[way], args.target)
            rounds[way].append(found)
            print(f"round {number + 1}, {way}: {json.dumps(found)}", flush=True)
    report: dict[str, Any] = {"gb": size, "rounds": rounds}
    for way, runs in rounds.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
        report[way] = medians | {"peak_rss_gib": max(run["peak_rss_gib"] for run in runs)}
        each = ", ".join(f"{value:.1f} {key} ({value / size:.2f} per GB)" for key, value in medians.items())
        print(f"{way}: {size:.2f} GB, {each}, peak RSS {report[way]['peak_rss_gib']:.2f} GiB")
    if "before" in rounds:
        for key in ("seconds", "cpu_seconds"):
            pairs = zip(rounds["before"], rounds["now"], strict=True)
            report[f"ratio_{key}"] = statistics.median(b[key] / n[key] for b, n in pairs)
            print(f"now is {report[f'ratio_{key}']:.2f}x as fast by {key}")
    return report


def proved(work: Path, tree: Path, target: str) -> dict[str, float]:
    # A proof is written into these, in a form that the earlier commit does not read.
    unproven = {path: path.read_bytes() for path in (work / "artifact" / n for n in ("msconv.json", "READY"))}
    command = [sys.executable, "-c", PROVE, str(work / "artifact"), target, str(work / "model")]
    done = subprocess.run(command, env=environment(tree), capture_output=True, text=True, check=False)
    for path, data in unproven.items():
        path.write_bytes(data)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if not found["ok"]:
        sys.exit(f"{tree}: not proven: {found}")
    return found


def msconv(tree: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "msconv", *words], env=environment(tree), check=True)


def environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{tree}/converter:{tree}/runtime"}


def git(*words: str) -> None:
    subprocess.run(["git", "-C", str(HERE), *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

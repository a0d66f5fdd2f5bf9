"""Serving on a CPU: the artifact, SGLang's own model, and the artifact's model traced by `@jit`, alternated.

    python benchmarks/serve.py --model Qwen3-0.6B --rounds 3 --json FILE

One bfloat16 checkpoint of a published shape with random values, computed in float32 everywhere, greedy, one server
at a time:
  msconv   `msconv serve` on the artifact, whose weights are stored as `--dtype`
  sglang   SGLang's own torch model on the checkpoint
  traced   the same cells as in the artifact, built in Python from the checkpoint and compiled by MindSpore's
           `@jit` at the first requests, as a slot without artifacts does it
  quant    `msconv serve` on the artifact that `msconv convert --quant` of `--quant` makes of the checkpoint
Start is from the process's start to the first token of a first request of 8 tokens.  Decode counts the tokens
between the moment the last request has its first token and the moment the first one ends, for prompts that differ
from their first token.  Beside it, the processors' time a token, of all the server's processes: other programs on
the machine disturb it less.  The order of the ways changes from round to round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.synthetic import write_checkpoint

ROOT = Path(__file__).parent.parent
WAYS = ("msconv", "sglang", "traced")
QUANT = "quant"  # a fourth, with --quant
START_LIMIT_S = 600
REQUEST_LIMIT_S = 1800
NEW_TOKENS = 24
POOL_TOKENS = 20480  # 16 requests of 1,024 tokens and what they generate
RUNTIME_SHARE = re.compile(r"msconv: start, seconds: (\{.*\})")


@dataclass
class Found:
    """What one server showed.  Seconds, tokens per second, seconds of processors a token, bytes."""

    start_s: float = 0.0
    own_s: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)
    decode_cpu: dict[str, float] = field(default_factory=dict)
    prefill: dict[str, float] = field(default_factory=dict)
    idle_bytes: dict[str, int] = field(default_factory=dict)
    loaded_bytes: dict[str, int] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="float32", help="of the artifact; bfloat16 is the source's")
    parser.add_argument("--quant", default="", help="also quantised so, as `w8a8`: a way of its own")
    parser.add_argument("--ways", default=",".join(WAYS), help="besides that of --quant")
    parser.add_argument("--requests", default="1,4,16")
    parser.add_argument("--contexts", default="128,1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts-only", action="store_true", help="measure only the start")
    parser.add_argument("--work", type=Path, help="keep checkpoint and artifact here  [default: temporary]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ways = args.ways.split(",") + [QUANT] * bool(args.quant)
    shapes = [(int(r), int(c)) for c in args.contexts.split(",") for r in args.requests.split(",")]
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = prepare(work, args.model, args.layers, args.dtype, args.quant)
        rounds: list[dict[str, Found]] = []
        for number in range(args.rounds):
            order = ways[number % len(ways) :] + ways[: number % len(ways)]
            found = {}
            for way in order:
                warm(places.artifact(way) or places.source)
                found[way] = measure(way, places, [] if args.starts_only else shapes, work)
                print(f"round {number + 1}, {way}: {found[way]}", flush=True)
            rounds.append(found)
    report = summarise(rounds, ways)
    print(table(report, ways))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True)
class Places:
    """A checkpoint, its artifact, and that of its quantised matrices, if there is one."""

    source: Path
    values: Path
    quantised: Path

    def artifact(self, way: str) -> Path | None:
        """What `msconv serve` gets in this way; None if the way reads the checkpoint."""
        return {"msconv": self.values, QUANT: self.quantised}.get(way)


def prepare(work: Path, model: str, layers: int, dtype: str, quant: str) -> Places:
    """Made once if they are kept."""
    places = Places(work / model, work / f"{model}-{dtype}", work / f"{model}-{dtype}-{quant}")
    if not (places.source / "model.safetensors.index.json").exists():  # what is written last
        write_checkpoint(places.source, model, layers)
    for artifact, options in ((places.values, []), (places.quantised, ["--quant", quant])):
        if (artifact is places.quantised and not quant) or (artifact / "READY").exists():
            continue
        msconv = [sys.executable, "-m", "msconv"]
        convert = ["convert", "--model", str(places.source), "--tp", "1", "--dtype", dtype, *options]
        subprocess.run([*msconv, *convert, "--output", str(artifact)], check=True)
        subprocess.run([*msconv, "compile", str(artifact), "--target", "cpu"], check=True)
    return places


def warm(directory: Path) -> None:
    """Read every weight file once, so that all ways start with their files in memory."""
    for path in directory.rglob("*.safetensors"):
        with path.open("rb") as f:
            while f.read(16 << 20):
                pass


def command(way: str, places: Places, port: int) -> tuple[list[str], dict[str, str]]:
    """What starts a server, and the environment it needs besides ours."""
    source = places.source
    common = ["--skip-tokenizer-init", "--max-total-tokens", str(POOL_TOKENS), "--log-level", "info"]
    if (artifact := places.artifact(way)) is not None:
        return [sys.executable, "-m", "msconv", "serve", str(artifact), "--port", str(port), "--", *common], {}
    serve = ["serve", str(places.values), "--port", str(port), "--json", "--print-command", "--", *common]
    ask = [sys.executable, "-m", "msconv", *serve]
    printed = subprocess.run(ask, capture_output=True, text=True, check=True)
    launch = json.loads(printed.stdout)
    argv, environment = launch["argv"], launch["environment"]
    if way == "sglang":
        argv[argv.index("--model-path") + 1] = str(source)
        argv[argv.index("--model-impl") + 1] = "sglang"
    else:
        environment |= {
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "benchmarks.traced",
            "TRACED_CHECKPOINT": str(source),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")])),
        }
    return argv, environment


@contextlib.contextmanager
def running(way: str, places: Places, log: Path) -> Iterator[tuple[int, psutil.Process]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv, environment = command(way, places, port)
    with log.open("wb") as f:
        process = subprocess.Popen(
            argv, env={**os.environ, **environment}, stdout=f, stderr=subprocess.STDOUT, start_new_session=True
        )
    main = psutil.Process(process.pid)
    try:
        yield port, main
    finally:
        everyone = [main, *main.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(everyone, 60)
        for one in left:
            one.kill()
        process.wait()


def measure(way: str, places: Places, shapes: list[tuple[int, int]], work: Path) -> Found:
    """One server from start to end."""
    found = Found()
    log = work / f"{way}.log"
    started = time.monotonic()
    with running(way, places, log) as (port, main):
        asyncio.run(_first_token(port, main, log))
        found.start_s = time.monotonic() - started
        found.idle_bytes = memory(main)
        if own := RUNTIME_SHARE.search(log.read_text(errors="replace")):
            found.own_s = json.loads(own[1])
        for requests, context in shapes:
            shape = f"{requests}x{context}"
            prefill, decode, cpu = asyncio.run(_load(port, main, requests, context))
            found.prefill.setdefault(str(context), prefill)
            found.decode[shape], found.decode_cpu[shape] = decode, cpu
        found.loaded_bytes = memory(main)
    return found


def memory(main: psutil.Process) -> dict[str, int]:
    """Of all the server's processes, in bytes: what is theirs alone (anonymous), and what is resident."""
    total = {"anonymous": 0, "resident": 0}
    for process in [main, *main.children(recursive=True)]:
        with contextlib.suppress(OSError, psutil.Error):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total["anonymous"] += int(line.split()[1]) * 1024
                elif line.startswith("VmRSS:"):
                    total["resident"] += int(line.split()[1]) * 1024
    return total


def cpu_time(main: psutil.Process) -> float:
    """Of all the server's processes, user's and system's, in seconds."""
    times = [p.cpu_times() for p in [main, *main.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


async def _first_token(port: int, main: psutil.Process, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError, aiohttp.ServerDisconnectedError):
                times = await _stream(session, port, list(range(1000, 1008)), 1)
                if times:
                    return
            if not main.is_running() or main.status() == psutil.STATUS_ZOMBIE or time.monotonic() > deadline:
                sys.exit(f"the server did not start; the end of its log:\n{log.read_text()[-4000:]}")
            await asyncio.sleep(0.05)


async def _load(port: int, main: psutil.Process, requests: int, context: int) -> tuple[float, float, float]:
    """(prompt tokens a second of one request alone, generated tokens a second of all together, the
    processors' seconds a generated token)."""
    drawn = random.Random(f"{requests} {context}")
    prompts = [[drawn.randrange(1000, 100_000) for _ in range(context)] for _ in range(requests)]
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        started = time.monotonic()
        first = await _stream(session, port, prompts[0], 1)
        prefill = context / (first[0] - started)
        for prompt in prompts[1:]:  # into the prefix cache: what is measured next is decoding
            await _stream(session, port, prompt, 1)
        before = cpu_time(main)
        all_times = await asyncio.gather(*(_stream(session, port, p, NEW_TOKENS) for p in prompts))
        spent = cpu_time(main) - before
    begin, end = max(t[0] for t in all_times), min(t[-1] for t in all_times)
    tokens = sum(begin < t <= end for times in all_times for t in times)
    return prefill, tokens / (end - begin), spent / sum(map(len, all_times))


async def _stream(session: aiohttp.ClientSession, port: int, ids: list[int], new: int) -> list[float]:
    """When each generated token came."""
    sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    times: list[float] = []
    body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
    async with session.post(f"http://127.0.0.1:{port}/generate", json=body) as reply:
        if reply.status != 200:
            return []
        async for line in reply.content:
            if line.startswith(b"data: {"):
                done = json.loads(line[6:])["meta_info"]["completion_tokens"]
                times += [time.monotonic()] * (done - len(times))
    return times


def summarise(rounds: list[dict[str, Found]], ways: list[str]) -> dict[str, Any]:
    """Medians over rounds, and of each round's ratios of two ways."""

    def each(way: str, key: str, shape: str | None = None) -> list[float]:
        values = [getattr(r[way], key) for r in rounds]
        return [v if shape is None else v[shape] for v in values]

    report: dict[str, Any] = {"rounds": len(rounds), "cpus": os.cpu_count(), "ways": {}, "ratios": {}}
    for way in ways:
        last = rounds[-1][way]
        report["ways"][way] = {
            "start_s": statistics.median(each(way, "start_s")),
            "own_s": {k: statistics.median(each(way, "own_s", k)) for k in last.own_s},
            "decode_tokens_per_s": {k: statistics.median(each(way, "decode", k)) for k in last.decode},
            "decode_cpu_s_per_token": {k: statistics.median(each(way, "decode_cpu", k)) for k in last.decode_cpu},
            "prefill_tokens_per_s": {k: statistics.median(each(way, "prefill", k)) for k in last.prefill},
            "idle_bytes": {k: statistics.median(each(way, "idle_bytes", k)) for k in last.idle_bytes},
            "loaded_bytes": {k: statistics.median(each(way, "loaded_bytes", k)) for k in last.loaded_bytes},
        }
    for one, other in (("msconv", "sglang"), ("msconv", "traced"), (QUANT, "msconv")):
        if one not in ways or other not in ways:
            continue

        def ratio(key: str, shape: str | None = None, one: str = one, other: str = other) -> float:
            pairs = zip(each(one, key, shape), each(other, key, shape), strict=True)
            return statistics.median(ours / theirs for ours, theirs in pairs)

        report["ratios"][f"{one} to {other}"] = {
            "start": ratio("start_s"),
            "decode": {k: ratio("decode", k) for k in rounds[-1][one].decode},
            "decode by cpu": {k: ratio("decode_cpu", k, other, one) for k in rounds[-1][one].decode_cpu},
            "prefill": {k: ratio("prefill", k) for k in rounds[-1][one].prefill},
        }
    return report


def table(report: dict[str, Any], ways: list[str]) -> str:
    rows: list[list[str]] = [["", *ways]]
    found = [report["ways"][w] for w in ways]
    rows.append(["start to first token, s", *(f"{f['start_s']:.1f}" for f in found)])
    for part in found[0]["own_s"]:
        rows.append(
            [f"  of it: {part}", *(f"{f['own_s'][part]:.2f}" if part in f["own_s"] else "" for f in found)]
        )
    for shape in found[0]["decode_tokens_per_s"]:
        rows.append([f"decode {shape}, tokens/s", *(f"{f['decode_tokens_per_s'][shape]:.1f}" for f in found)])
        values = (f"{f['decode_cpu_s_per_token'][shape] * 1e3:.1f}" for f in found)
        rows.append(["  processors' time a token, ms", *values])
    for context in found[0]["prefill_tokens_per_s"]:
        values = (f"{f['prefill_tokens_per_s'][context]:.0f}" for f in found)
        rows.append([f"prefill of {context}, tokens/s", *values])
    for when in ("idle", "loaded"):
        for kind in ("anonymous", "resident"):
            values = (f"{f[f'{when}_bytes'].get(kind, 0) / 2**30:.2f}" for f in found)
            rows.append([f"memory {when}, {kind}, GiB", *values])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    for title, ratios in report["ratios"].items():
        decode = ", ".join(f"{k} {v:.2f}x" for k, v in ratios["decode"].items())
        by_cpu = ", ".join(f"{k} {v:.2f}x" for k, v in ratios["decode by cpu"].items())
        prefill = ", ".join(f"{k} {v:.2f}x" for k, v in ratios["prefill"].items())
        lines.append(
            f"{title}: start {ratios['start']:.2f}x; decode {decode or 'not measured'}, "
            f"by processors' time {by_cpu or 'not measured'}; prefill {prefill}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

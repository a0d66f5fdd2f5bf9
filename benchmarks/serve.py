"""Serving on a CPU: the artifact, SGLang's own model, and the artifact's model traced by `@jit`, alternated.

    python benchmarks/serve.py --model Qwen3-0.6B --rounds 3 --json FILE

One bfloat16 checkpoint of a published shape with random values, computed in float32 everywhere, greedy, one server
at a time:
  msconv   `msconv serve` on the artifact, whose weights are stored as `--dtype`
  sglang   SGLang's own torch model on the checkpoint
  traced   the same cells as in the artifact, built in Python from the checkpoint and compiled by MindSpore's
           `@jit` at the first requests, as a slot without artifacts does it
  quant    `msconv serve` on the artifact that `msconv convert --quant` of `--quant` makes of the checkpoint
  ngram, standalone
           `msconv serve` on the artifact with SGLang's drafts of these names (`--drafts`).  Layers run and add
           nothing then: the model repeats its last token, and a copy of its first `--draft-layers`, STANDALONE's
           draft, does so too.  Every guess is right: the best that drafts can do
Start is from the process's start to the first token of a first request of 8 tokens.  Decode counts the tokens
between the moment the last request has its first token and the moment the first one ends, for prompts that differ
from their first token.  Beside it, the processors' time a token, of all the server's processes: other programs on
the machine disturb it less.  The order of the ways changes from round to round.  Where a way does not start, or
gives no tokens, the table says `-`, and the rest is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
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
from collections.abc import Iterable, Iterator
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
DRAFTS = {  # further ones, with --drafts: flags of SGLang
    "ngram": ["--speculative-algorithm", "NGRAM", "--page-size", "1"],
    "standalone": ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path"],
}
MISSING = float("nan")  # what a way did not show
START_LIMIT_S = 600
REQUEST_LIMIT_S = 1800
NEW_TOKENS = 24
SETTLING_S = 3
POOL_TOKENS = 20480  # 16 requests of 1,024 tokens and what they generate
RUNTIME_SHARE = re.compile(r"msconv: start, seconds: (\{.*\})")


@dataclass
class Found:
    """What one server showed.  Seconds, tokens per second, seconds of processors a token, bytes."""

    start_s: float = MISSING
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
    parser.add_argument("--drafts", default="", help=f"also {' and '.join(DRAFTS)}, by commas")
    parser.add_argument("--draft-layers", type=int, default=2, help="of STANDALONE's draft")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="of each answer that is measured")
    parser.add_argument("--ways", default=",".join(WAYS), help="besides that of --quant")
    parser.add_argument("--requests", default="1,4,16")
    parser.add_argument("--contexts", default="128,1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts-only", action="store_true", help="measure only the start")
    parser.add_argument("--work", type=Path, help="keep checkpoint and artifact here  [default: temporary]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    drafts = [name for name in args.drafts.split(",") if name]
    if not set(drafts) <= set(DRAFTS):
        parser.error(f"--drafts takes {' and '.join(DRAFTS)}")
    ways = args.ways.split(",") + [QUANT] * bool(args.quant) + drafts
    shapes = [(int(r), int(c)) for c in args.contexts.split(",") for r in args.requests.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the server that is running
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = prepare(work, args)
        rounds: list[dict[str, Found]] = []
        for number in range(args.rounds):
            order = ways[number % len(ways) :] + ways[: number % len(ways)]
            found = {}
            for way in order:
                warm(places.artifact(way) or places.source)
                found[way] = measure(way, places, [] if args.starts_only else shapes, work, args.new_tokens)
                print(f"round {number + 1}, {way}: {found[way]}", flush=True)
            rounds.append(found)
    report = summarise(rounds, ways)
    print(table(report, ways))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True)
class Places:
    """A checkpoint, its artifact, that of its quantised matrices and that of its first layers, if there are."""

    source: Path
    values: Path
    quantised: Path
    draft: Path

    def artifact(self, way: str) -> Path | None:
        """What `msconv serve` gets in this way; None if the way reads the checkpoint."""
        return {"msconv": self.values, QUANT: self.quantised, **dict.fromkeys(DRAFTS, self.values)}.get(way)

    def flags(self, way: str) -> list[str]:
        """SGLang's, of this way alone."""
        return [*DRAFTS.get(way, []), *([str(self.draft)] if way == "standalone" else [])]


def prepare(work: Path, args: argparse.Namespace) -> Places:
    """Made once if they are kept."""
    source = work / (f"{args.model}-repeating" if args.drafts else args.model)
    first = source.with_name(f"{source.name}-first")
    artifact = source.with_name(f"{source.name}-{args.dtype}")
    quantised, draft = (artifact.with_name(f"{artifact.name}-{name}") for name in (args.quant, "draft"))
    if not (source / "model.safetensors.index.json").exists():  # what is written last
        write_checkpoint(source, args.model, args.layers, repeats=bool(args.drafts))
    make(source, artifact, args.dtype)
    if args.quant:
        make(source, quantised, args.dtype, "--quant", args.quant)
    if args.drafts:
        write_first_layers(source, first, args.draft_layers)
        make(first, draft, args.dtype)
    return Places(source, artifact, quantised, draft)


def make(source: Path, artifact: Path, dtype: str, *options: str) -> None:
    """Convert and compile, unless that was done."""
    if (artifact / "READY").exists():
        return
    msconv = [sys.executable, "-m", "msconv"]
    convert = ["convert", "--model", str(source), "--tp", "1", "--dtype", dtype, *options]
    subprocess.run([*msconv, *convert, "--output", str(artifact)], check=True)
    subprocess.run([*msconv, "compile", str(artifact), "--target", "cpu"], check=True)


def write_first_layers(source: Path, to: Path, layers: int) -> None:
    """A checkpoint of the first layers of another, with its embedding, last norm and head."""
    from safetensors.torch import load_file, save_file

    to.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    tensors = {k: v for path in source.glob("*.safetensors") for k, v in load_file(path).items()}
    numbers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in tensors}
    kept = {n: t for n, t in tensors.items() if not (found := numbers[n]) or int(found[1]) < layers}
    save_file(kept, to / "model.safetensors")


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
        serve = ["serve", str(artifact), "--port", str(port), "--", *common, *places.flags(way)]
        return [sys.executable, "-m", "msconv", *serve], {}
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


class NoAnswer(Exception):
    """A server that did not start, or a request without tokens."""


def measure(way: str, places: Places, shapes: list[tuple[int, int]], work: Path, new_tokens: int) -> Found:
    """One server from start to end."""
    found = Found()
    log = work / f"{way}.log"
    started = time.monotonic()
    with running(way, places, log) as (port, main):
        try:
            asyncio.run(_first_token(port, main, log))
        except (NoAnswer, OSError, aiohttp.ClientError, TimeoutError) as e:
            print(f"{way}: {e!r}", file=sys.stderr)
            return found
        found.start_s = time.monotonic() - started
        found.idle_bytes = memory(main)
        asyncio.run(_settle(port))
        if own := RUNTIME_SHARE.search(log.read_text(errors="replace")):
            found.own_s = json.loads(own[1])
        for requests, context in shapes:
            shape = f"{requests}x{context}"
            try:
                prefill, decode, cpu = asyncio.run(_load(port, main, requests, context, new_tokens))
            except (NoAnswer, OSError, aiohttp.ClientError, TimeoutError) as e:
                print(f"{way}, {shape}: {e!r}", file=sys.stderr)
                continue
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
                raise NoAnswer(f"the server did not start; the end of its log:\n{log.read_text()[-4000:]}")
            await asyncio.sleep(0.05)


async def _settle(port: int) -> None:
    """Lets a server do what it does once, after its first answers: SGLang's processes search for garbage a last
    time, in which no token comes for some tenths of a second."""
    async with aiohttp.ClientSession() as session:
        await _stream(session, port, list(range(1000, 1008)), 8)
        await asyncio.sleep(SETTLING_S)


async def _load(
    port: int, main: psutil.Process, requests: int, context: int, new_tokens: int
) -> tuple[float, float, float]:
    """(prompt tokens a second of one request alone, generated tokens a second of all together, the
    processors' seconds a generated token)."""
    drawn = random.Random(f"{requests} {context}")
    prompts = [[drawn.randrange(1000, 100_000) for _ in range(context)] for _ in range(requests)]
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        started = time.monotonic()
        if not (first := await _stream(session, port, prompts[0], 1)):
            raise NoAnswer("no token came for a prompt")
        prefill = context / (first[0] - started)
        for prompt in prompts[1:]:  # into the prefix cache: what is measured next is decoding
            await _stream(session, port, prompt, 1)
        before = cpu_time(main)
        all_times = await asyncio.gather(*(_stream(session, port, p, new_tokens) for p in prompts))
        spent = cpu_time(main) - before
    if not all(all_times):
        raise NoAnswer("an answer without tokens")
    begin, end = max(t[0] for t in all_times), min(t[-1] for t in all_times)
    tokens = sum(begin < t <= end for times in all_times for t in times)
    rate = tokens / (end - begin) if begin < end else MISSING  # none was generated while all ran
    return prefill, rate, spent / sum(map(len, all_times))


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


def middle(values: Iterable[float]) -> float | None:
    """The median of what was shown; None of nothing."""
    shown = [v for v in values if not math.isnan(v)]
    return statistics.median(shown) if shown else None


def summarise(rounds: list[dict[str, Found]], ways: list[str]) -> dict[str, Any]:
    """Medians over rounds, and of each round's ratios of two ways; None of what no round showed."""

    def parts(key: str) -> list[str]:
        """What any way showed of this kind."""
        return list(dict.fromkeys(part for r in rounds for found in r.values() for part in getattr(found, key)))

    def each(way: str, key: str, part: str) -> list[float]:
        return [getattr(r[way], key).get(part, MISSING) for r in rounds]

    def ratio(one: str, other: str, key: str, part: str) -> float | None:
        pairs = zip(each(one, key, part), each(other, key, part), strict=True)
        return middle(ours / theirs for ours, theirs in pairs if theirs)

    named = {
        "own_s": "own_s",
        "decode_tokens_per_s": "decode",
        "decode_cpu_s_per_token": "decode_cpu",
        "prefill_tokens_per_s": "prefill",
        "idle_bytes": "idle_bytes",
        "loaded_bytes": "loaded_bytes",
    }
    report: dict[str, Any] = {"rounds": len(rounds), "cpus": os.cpu_count(), "ways": {}, "ratios": {}}
    for way in ways:
        report["ways"][way] = {"start_s": middle(r[way].start_s for r in rounds)}
        for name, key in named.items():
            report["ways"][way][name] = {part: middle(each(way, key, part)) for part in parts(key)}
    for one, other in (("msconv", "sglang"), ("msconv", "traced"), *((w, "msconv") for w in (QUANT, *DRAFTS))):
        if one not in ways or other not in ways:
            continue
        report["ratios"][f"{one} to {other}"] = {
            "start": middle(r[one].start_s / r[other].start_s for r in rounds),
            "decode": {k: ratio(one, other, "decode", k) for k in parts("decode")},
            "decode by cpu": {k: ratio(other, one, "decode_cpu", k) for k in parts("decode_cpu")},
            "prefill": {k: ratio(one, other, "prefill", k) for k in parts("prefill")},
        }
    return report


def shown(value: float | None, digits: int, scale: float = 1, unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}{unit}"


def table(report: dict[str, Any], ways: list[str]) -> str:
    found = [report["ways"][w] for w in ways]
    rows: list[list[str]] = [["", *ways], ["start to first token, s", *(shown(f["start_s"], 1) for f in found)]]

    def row(title: str, key: str, part: str, digits: int, scale: float = 1) -> None:
        rows.append([title, *(shown(f[key][part], digits, scale) for f in found)])

    for part in found[0]["own_s"]:
        row(f"  of it: {part}", "own_s", part, 2)
    for shape in found[0]["decode_tokens_per_s"]:
        row(f"decode {shape}, tokens/s", "decode_tokens_per_s", shape, 1)
        row("  processors' time a token, ms", "decode_cpu_s_per_token", shape, 1, 1e3)
    for context in found[0]["prefill_tokens_per_s"]:
        row(f"prefill of {context}, tokens/s", "prefill_tokens_per_s", context, 0)
    for when in ("idle", "loaded"):
        for kind in found[0][f"{when}_bytes"]:
            row(f"memory {when}, {kind}, GiB", f"{when}_bytes", kind, 2, 2**-30)
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in rows
    ]
    for title, ratios in report["ratios"].items():
        decode, by_cpu, prefill = (
            ", ".join(f"{k} {shown(v, 2, unit='x')}" for k, v in ratios[key].items()) or "not measured"
            for key in ("decode", "decode by cpu", "prefill")
        )
        lines.append(
            f"{title}: start {shown(ratios['start'], 2, unit='x')}; decode {decode}, by processors' time "
            f"{by_cpu}; prefill {prefill}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

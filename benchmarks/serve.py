"""Serving on a CPU: the artifact, SGLang's own model, and the artifact's model traced by `@jit`, alternated.

    python benchmarks/serve.py --model Qwen3-0.6B --rounds 3 --json FILE

One bfloat16 checkpoint of a published shape with random values, greedy, activations in float32 if nothing is said:
  msconv   `msconv serve` on the artifact, whose weights are stored as `--dtype`
  sglang   SGLang's own torch model on the checkpoint
  msconv-bfloat16, sglang-bfloat16
           the first two with activations in bfloat16: kernels that round, which need `--dtype bfloat16` here, and
           SGLang's own `--dtype bfloat16`; only if `--ways` names them
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
the machine disturb it less.  A round starts a server in each way, one after the other; then they decode in turns,
so that all meet the machine as it is at that time.  One server works at a time: the others are held (SIGSTOP), and
keep only their memory.  Where the memory does not hold all, a round has groups of them (`--at-once`).  The order
of the ways changes from round to round.  Where a way does not start, or gives no tokens, the table says `-`, and
the rest is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.servers import (
    DRAFTS,
    MSCONV,
    MSCONV_BFLOAT16,
    QUANT,
    ROUNDING,
    SGLANG,
    SGLANG_BFLOAT16,
    WAYS,
    Places,
    Server,
    cpu_time,
    memory,
    prepare,
    running,
    servers_that_fit,
    warm,
)
from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.kernels.variants import CHOICE, usable

MISSING = float("nan")  # what a way did not show
START_LIMIT_S = 600
REQUEST_LIMIT_S = 1800
NEW_TOKENS = 24
SETTLING_S = 3
TURNS = 3  # of each way, in decoding a shape
PER_TURN = ("decode", "decode_cpu")  # of what is found
RUNTIME_SHARE = re.compile(r"msconv: start, seconds: (\{.*\})")


@dataclass
class Found:
    """What one server showed: seconds, tokens per second, seconds of processors, bytes; decoding: by turns."""

    start_s: float = MISSING
    own_s: dict[str, float] = field(default_factory=dict)
    decode: dict[str, list[float]] = field(default_factory=dict)
    decode_cpu: dict[str, list[float]] = field(default_factory=dict)
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
    parser.add_argument(
        "--at-once", type=int, help="servers that are up at once  [default: what the memory holds]"
    )
    parser.add_argument("--starts-only", action="store_true", help="measure only the start")
    parser.add_argument("--work", type=Path, help="keep checkpoint and artifact here  [default: temporary]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    drafts = [name for name in args.drafts.split(",") if name]
    if not set(drafts) <= set(DRAFTS):
        parser.error(f"--drafts takes {' and '.join(DRAFTS)}")
    named = args.ways.split(",")
    if unknown := set(named) - {*WAYS, MSCONV_BFLOAT16, SGLANG_BFLOAT16}:
        parser.error(f"--ways: there is no {', '.join(sorted(unknown))}")
    if MSCONV_BFLOAT16 in named:
        if args.dtype != "bfloat16":
            parser.error(f"{MSCONV_BFLOAT16} needs --dtype bfloat16: products with float32 are not rounded")
        try:
            usable(ROUNDING[CHOICE])
        except EnvironmentProblem as e:
            parser.error(f"{MSCONV_BFLOAT16}: {e.message}")
    ways = named + [QUANT] * bool(args.quant) + drafts
    shapes = [(int(r), int(c)) for c in args.contexts.split(",") for r in args.requests.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the server that is running
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = prepare(work, args)
        at_once = args.at_once or servers_that_fit(places.source)
        rounds: list[dict[str, Found]] = []
        for number in range(args.rounds):
            order = ways[number % len(ways) :] + ways[: number % len(ways)]
            found: dict[str, Found] = {}
            for first in range(0, len(order), at_once):
                group = order[first : first + at_once]
                found |= measure(group, places, [] if args.starts_only else shapes, work, args.new_tokens)
            for way in order:
                print(f"round {number + 1}, {way}: {found[way]}", flush=True)
            rounds.append(found)
    report = summarise(rounds, ways)
    print(table(report, ways))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


class NoAnswer(Exception):
    """A server that did not start, or a request without tokens."""


FAILURES = (  # of one way: the others go on
    NoAnswer,
    OSError,
    ValueError,
    subprocess.SubprocessError,
    aiohttp.ClientError,
    TimeoutError,
    psutil.Error,
)


def measure(
    ways: Sequence[str], places: Places, shapes: list[tuple[int, int]], work: Path, new_tokens: int
) -> dict[str, Found]:
    """One server in each way from start to end.  They are started one after the other, and decode in turns."""
    found = {way: Found() for way in ways}
    servers: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:
        for way in ways:
            warm(places.artifact(way) or places.source)
            log, started = work / f"{way}.log", time.monotonic()
            of_way = stack.enter_context(contextlib.ExitStack())
            with reported(way):
                server = of_way.enter_context(running(way, places, log))
                asyncio.run(_first_token(server, log))
                found[way].start_s = time.monotonic() - started
                found[way].idle_bytes = memory(server)
                asyncio.run(_settle(server.port))
                if own := RUNTIME_SHARE.search(log.read_text(errors="replace")):
                    found[way].own_s = json.loads(own[1])
                server.hold()
                servers[way] = server
            if way not in servers:
                of_way.close()
        for requests, context in shapes:
            shape = f"{requests}x{context}"
            prompts = some_prompts(requests, context)
            ready = []
            for way, server in servers.items():
                with reported(f"{way}, {shape}"), server.awake():
                    found[way].prefill.setdefault(str(context), asyncio.run(_prefill(server.port, prompts)))
                    ready.append(way)
            for way in ready * TURNS:
                rate, cpu = MISSING, MISSING
                with reported(f"{way}, {shape}"), servers[way].awake():
                    rate, cpu = asyncio.run(_decode(servers[way], prompts, new_tokens))
                found[way].decode.setdefault(shape, []).append(rate)
                found[way].decode_cpu.setdefault(shape, []).append(cpu)
                print(f"{way}, {shape}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
        for way, server in servers.items():
            found[way].loaded_bytes = memory(server)
    return found


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """What fails in one way is said, and the rest is measured."""
    try:
        yield
    except FAILURES as e:
        print(f"{what}: {e!r}", file=sys.stderr)


def some_prompts(requests: int, context: int) -> list[list[int]]:
    drawn = random.Random(f"{requests} {context}")
    return [[drawn.randrange(1000, 100_000) for _ in range(context)] for _ in range(requests)]


async def _first_token(server: Server, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError, aiohttp.ServerDisconnectedError):
                times = await _stream(session, server.port, list(range(1000, 1008)), 1)
                if times:
                    return
            ended = not server.main.is_running() or server.main.status() == psutil.STATUS_ZOMBIE
            if ended or time.monotonic() > deadline:
                raise NoAnswer(f"the server did not start; the end of its log:\n{log.read_text()[-4000:]}")
            await asyncio.sleep(0.05)


async def _settle(port: int) -> None:
    """Lets a server do what it does once, after its first answers: SGLang's processes search for garbage a last
    time, in which no token comes for some tenths of a second."""
    async with aiohttp.ClientSession() as session:
        await _stream(session, port, list(range(1000, 1008)), 8)
        await asyncio.sleep(SETTLING_S)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_LIMIT_S))


async def _prefill(port: int, prompts: list[list[int]]) -> float:
    """Prompt tokens a second of the first, alone.  Then all are in the prefix cache: what comes next decodes."""
    async with _session() as session:
        started = time.monotonic()
        if not (first := await _stream(session, port, prompts[0], 1)):
            raise NoAnswer("no token came for a prompt")
        for prompt in prompts[1:]:
            await _stream(session, port, prompt, 1)
    return len(prompts[0]) / (first[0] - started)


async def _decode(server: Server, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """(generated tokens a second of all requests together, the processors' seconds a generated token)."""
    before = cpu_time(server)
    async with _session() as session:
        all_times = await asyncio.gather(*(_stream(session, server.port, p, new_tokens) for p in prompts))
    spent = cpu_time(server) - before
    if not all(all_times):
        raise NoAnswer("an answer without tokens")
    begin, end = max(t[0] for t in all_times), min(t[-1] for t in all_times)
    tokens = sum(begin < t <= end for times in all_times for t in times)
    rate = tokens / (end - begin) if begin < end else MISSING  # none was generated while all ran
    return rate, spent / sum(map(len, all_times))


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
    """Medians over rounds and turns, and of the ratios of two ways in each; None of what none showed."""

    def parts(key: str) -> list[str]:
        """What any way showed of this kind."""
        return list(dict.fromkeys(part for r in rounds for found in r.values() for part in getattr(found, key)))

    def each(way: str, key: str, part: str) -> list[float]:
        values: list[float] = []
        for r in rounds:
            value = getattr(r[way], key).get(part, [MISSING] * TURNS if key in PER_TURN else MISSING)
            values += value if key in PER_TURN else [value]
        return values

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
    for one, other in (
        *itertools.product((MSCONV, MSCONV_BFLOAT16), (SGLANG, SGLANG_BFLOAT16, "traced")),
        *((w, MSCONV) for w in (MSCONV_BFLOAT16, QUANT, *DRAFTS)),
    ):
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

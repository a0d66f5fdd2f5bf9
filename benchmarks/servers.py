"""Servers that are measured: what they serve, how they are started, held and ended, and what they take."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.synthetic import write_checkpoint
from msconv_runtime.kernels.variants import CHOICE
from msconv_runtime.sglang.environment import NO_COMPILING, STARTUP

ROOT = Path(__file__).parent.parent
MSCONV, MSCONV_BFLOAT16 = "msconv", "msconv-bfloat16"
SGLANG, SGLANG_BFLOAT16 = "sglang", "sglang-bfloat16"
WAYS = (MSCONV, SGLANG, "traced")
ROUNDING = {CHOICE: "avx512bf16"}
QUANT = "quant"  # a further one, with --quant
DRAFTS = {  # further ones, with --drafts: flags of SGLang
    "ngram": ["--speculative-algorithm", "NGRAM", "--page-size", "1"],
    "standalone": ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path"],
}
SERVER_BYTES = 2 << 30  # of a server's processes, without weights and caches
POOL_TOKENS = 20480  # 16 requests of 1,024 tokens and what they generate
POOL_SHARE = "0.9"  # of the free memory, at most: a server that starts beside others has all POOL_TOKENS too


@dataclass(frozen=True)
class Places:
    """A checkpoint, its artifact, that of its quantised matrices and that of its first layers, if there are."""

    source: Path
    values: Path
    quantised: Path
    draft: Path

    def artifact(self, way: str) -> Path | None:
        """What `msconv serve` gets in this way; None if the way reads the checkpoint."""
        values = dict.fromkeys((MSCONV, MSCONV_BFLOAT16, *DRAFTS), self.values)
        return (values | {QUANT: self.quantised}).get(way)

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


def servers_that_fit(source: Path) -> int:
    """How many servers the memory holds at once, each with the weights and the whole pool in float32."""
    config = json.loads((source / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width  # of a token
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors")) * 2  # of bfloat16
    each = weights + values * 4 * POOL_TOKENS + SERVER_BYTES
    return max(1, int(psutil.virtual_memory().available // each))


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
    common += ["--mem-fraction-static", POOL_SHARE]
    if (artifact := places.artifact(way)) is not None:
        serve = ["serve", str(artifact), "--port", str(port), "--", *common, *places.flags(way)]
        return [sys.executable, "-m", "msconv", *serve], ROUNDING if way == MSCONV_BFLOAT16 else {}
    serve = ["serve", str(places.values), "--port", str(port), "--json", "--print-command", "--", *common]
    ask = [sys.executable, "-m", "msconv", *serve]
    printed = subprocess.run(ask, capture_output=True, text=True, check=True)
    launch = json.loads(printed.stdout)
    argv, environment = launch["argv"], launch["environment"]
    environment.pop(NO_COMPILING, None)  # like STARTUP below, this is only for artifacts
    path = environment["PYTHONPATH"].split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in path if p != str(STARTUP))
    if way in (SGLANG, SGLANG_BFLOAT16):
        environment["SGLANG_PLUGINS"] = "none"  # no plug-in of ours either
        argv[argv.index("--model-path") + 1] = str(source)
        argv[argv.index("--model-impl") + 1] = "sglang"
        argv[argv.index("--dtype") + 1] = "float32" if way == SGLANG else "bfloat16"
    else:
        environment |= {
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "benchmarks.traced",
            "TRACED_CHECKPOINT": str(source),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), environment["PYTHONPATH"]])),
        }
    return argv, environment


@dataclass(frozen=True)
class Server:
    port: int
    main: psutil.Process

    def everyone(self) -> list[psutil.Process]:
        return [self.main, *self.main.children(recursive=True)]

    def hold(self) -> None:
        """Take no processor's time until `awake`."""
        for process in self.everyone():
            process.suspend()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        for process in self.everyone():
            process.resume()
        try:
            yield
        finally:
            self.hold()


@contextlib.contextmanager
def running(way: str, places: Places, log: Path) -> Iterator[Server]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv, environment = command(way, places, port)
    with log.open("wb") as f:
        process = subprocess.Popen(
            argv, env={**os.environ, **environment}, stdout=f, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(port, psutil.Process(process.pid))
    try:
        yield server
    finally:
        everyone = [server.main]
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone = server.everyone()
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()  # what is held hears no other signal
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(everyone, 60)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def memory(server: Server) -> dict[str, int]:
    """Of all the server's processes, in bytes: what is theirs alone (anonymous), and what is resident."""
    total = {"anonymous": 0, "resident": 0}
    for process in server.everyone():
        with contextlib.suppress(OSError, psutil.Error):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total["anonymous"] += int(line.split()[1]) * 1024
                elif line.startswith("VmRSS:"):
                    total["resident"] += int(line.split()[1]) * 1024
    return total


def cpu_time(server: Server) -> float:
    """Of all the server's processes, user's and system's, in seconds."""
    times = [p.cpu_times() for p in server.everyone()]
    return sum(t.user + t.system for t in times)

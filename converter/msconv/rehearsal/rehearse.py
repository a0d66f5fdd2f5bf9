"""Rehearsing an artifact: start, ask, stop, compare, record."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from msconv_runtime.artifact import Graph, Manifest, Rehearsed, read_manifest, write_manifest
from msconv_runtime.doctor import Machine
from msconv_runtime.errors import ArtifactError, ResourceError, UsageError, VerificationFailed
from msconv_runtime.graphs import graphs_of
from msconv_runtime.integrity import check_artifact
from msconv_runtime.sglang.launch import (
    LOCALHOST,
    Launch,
    Nodes,
    Settings,
    ascend_target,
    copies,
    given_flags,
    npu_flags,
    number,
    plan_launch,
    refuse_taken,
)
from msconv_runtime.weights import required

from ..compile import configuration, mindspore_version
from ..families import DecoderConfig
from ..stream.lock import exclusive
from ..verify.compare import FLOAT32_BOUND, half_precision_bound
from ..verify.reference import source_of
from .answers import Answers, Expected, make_reference
from .build import build_device
from .client import HttpClient
from .loading import loading_problems
from .records import Rank, read_replicas
from .replay import Replay, Replayer
from .scenario import Conversation, Scenario, make_scenario, run_scenario
from .server import CHIPS, DEVICE_VERSION, Device, Server, free_port, prepare, serving, sglang_version

SMALL_BYTES = 2 << 30  # of weights, of all ranks, up to which graphs compute in float32 unless told otherwise
POOL_TOKENS = 4096  # of the KV pool, unless flags say otherwise: it is host memory here
MEMORY = 64 << 30  # of each device, as SGLang sees it
SMALL_WORK = 64 << 20  # of weights
LONG_S = 1800  # of interpreting, from which on the number of prompts must be given
SECONDS_A_VALUE = {True: 1.2e-9, False: 4e-9}  # of a weight in a call, exact or not: measured on 2 cores
SOME = 20  # problems that are told

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line gives.  `exact`: None leaves it to the size.  `prompts`: 0 for all.  `end`: how the
    server is ended, `term` or `kill`: by SIGTERM, or by killing one of its ranks."""

    target: str | None = None
    prompts: int = 0
    exact: bool | None = None
    machines: int = 1
    port: int | None = None
    reference: str | None = None
    keep: Path | None = None
    end: str = "term"
    extra: tuple[str, ...] = ()


@dataclass
class Rehearsal:
    """The outcome.  `problems`: what is wrong, the first first."""

    target: str
    exact: bool
    command: str
    bound: float
    replay: Replay = field(default_factory=Replay)
    answers: Answers = field(default_factory=Answers)
    conversations: list[Conversation] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    start_s: float = 0.0
    end_s: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems and self.answers.tokens > 0


def rehearse(root: Path, options: Options, say: Say = lambda text: None) -> Rehearsal:
    """Serve the artifact on the rehearsal device and hold all that the server did against what it means.  A failed
    rehearsal removes an earlier one of the same layout.

    Raises EnvironmentProblem without a compiler, SGLang or the port; ArtifactError or UsageError for an artifact
    that has nothing for an NPU; ResourceError if interpreting it would take too long; VerificationFailed if the
    server does not start, answer or end."""
    started = time.monotonic()
    root = root.resolve()
    manifest = read_manifest(root)
    target = options.target or ascend_target(root, manifest)
    _check_target(root, manifest, target)
    config = configuration(root, manifest)
    _check_damage(root, manifest)
    sglang, mindspore = sglang_version(), mindspore_version()
    exact = options.exact if options.exact is not None else _weight_bytes(manifest) <= SMALL_BYTES
    page = number(given_flags(list(options.extra)), "--page-size") or int(
        npu_flags(manifest, target)["--page-size"]
    )
    scenario = make_scenario(config.vocab, config.max_positions, page, options.prompts)
    _check_size(manifest, config, scenario, exact, options)
    source = source_of(root, options.reference)
    say("building the rehearsal device" if options.keep else "preparing the rehearsal device")
    library = build_device()
    with _directory(options.keep) as work:
        launches, port = _launches(root, manifest, target, scenario, options)
        result = Rehearsal(target, exact, launches[0].shell(), FLOAT32_BOUND if exact else math.inf)
        devices = manifest.parallel.tp * copies(given_flags(list(options.extra))) // options.machines
        name, arch = CHIPS[target]
        prepare(work, Device(str(library), devices, MEMORY, name, arch, exact))
        try:
            _run(result, [_exact(x) if exact else x for x in launches], port, work, scenario, config, options, say)
            say("comparing with transformers and with the interpreter")
            _compare(result, root, manifest, target, source, work, config)
        except VerificationFailed:
            _record(root, target, options, None)
            raise
        result.seconds = time.monotonic() - started
        _record(root, target, options, _entry(result, manifest, scenario, options, sglang, mindspore))
    return result


def _check_target(root: Path, manifest: Manifest, target: str) -> None:
    if target not in CHIPS:
        raise UsageError(
            f"--target {target}: a rehearsal is of an NPU's graphs.", f"Targets are: {', '.join(CHIPS)}."
        )
    graphs_of(root, manifest, target)
    required(root, manifest)


def _check_damage(root: Path, manifest: Manifest) -> None:
    if damage := check_artifact(root, manifest):
        places = "\n".join(f"  {d.path}: {d.tensor or 'file'}: {d.problem}" for d in damage[:SOME])
        raise ArtifactError(
            f"{root}: its bytes are not those the manifest describes:\n{places}",
            "Copy the artifact again, or convert again with --force.",
        )


def _weight_bytes(manifest: Manifest) -> int:
    return sum(f.size for f in manifest.weights.files) if manifest.weights else 0


def _check_size(
    manifest: Manifest, config: DecoderConfig, scenario: Scenario, exact: bool, options: Options
) -> None:
    """Raises ResourceError if the interpreter would want more memory than there is, or very long for a scenario
    that nobody chose."""
    values = sum(math.prod(t.shape) for t in manifest.weights.tensors) if manifest.weights else 0
    tp = manifest.parallel.tp
    need = values * tp * (6 if exact else 4) * copies(given_flags(list(options.extra)))
    free = Machine().memory()
    if free is not None and need > free:
        raise ResourceError(
            f"Interpreting this artifact takes about {need / 2**30:.1f} GiB of memory; {free / 2**30:.1f} are free.",
            "--no-exact takes a third less; or rehearse a model of the same family with fewer layers: the path is "
            "the same.",
        )
    a_call = values * tp * SECONDS_A_VALUE[exact] * 2  # in the server, and once more
    seconds = a_call * scenario.num_calls
    if seconds > LONG_S and not options.prompts:
        one = make_scenario(config.vocab, config.max_positions, scenario.page, 1)
        raise ResourceError(
            f"Interpreting this artifact would take about {seconds / 60:.0f} minutes "
            f"({scenario.num_prompts} prompts, {scenario.num_calls} calls of {a_call:.1f} s).",
            f"`--prompts 1` takes about {a_call * one.num_calls / 60:.0f}, `--prompts "
            f"{scenario.num_prompts}` all of it.",
        )


@contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    """Where the server runs and writes: a new directory, kept if it was named."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="msconv-rehearse-", ignore_cleanup_errors=True) as work:
            yield Path(work)
        return
    if keep.exists() and any(keep.iterdir()):
        raise UsageError(f"--keep {keep}: is not empty.", "Name a new directory.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


def _launches(
    root: Path, manifest: Manifest, target: str, scenario: Scenario, options: Options
) -> tuple[list[Launch], int]:
    """The command of each machine, and the port of the first.  A few flags keep the server small, unless given."""
    port = options.port or free_port()
    refuse_taken(LOCALHOST, port)
    page = scenario.page
    chunk = max(page, (scenario.longest - 1) // page * page)
    usual = {
        "--max-total-tokens": str(POOL_TOKENS),
        "--chunked-prefill-size": str(chunk),
        "--max-running-requests": "16",
        "--skip-tokenizer-init": "",
    }
    given = given_flags(list(options.extra))
    added = [word for name, value in usual.items() if name not in given for word in (name, value) if word]
    meeting = f"{LOCALHOST}:{free_port()}" if options.machines > 1 else None
    settings = Settings(target=target)
    launches = [
        plan_launch(
            root,
            "npu",
            LOCALHOST,
            port if machine == 0 else free_port(),
            [*added, *options.extra],
            settings,
            Nodes(options.machines, machine, meeting),
            elsewhere=True,
            target=target,
        )
        for machine in range(options.machines)
    ]
    return launches, port


def _exact(launch: Launch) -> Launch:
    """The same with a KV pool that rounds nothing."""
    argv = list(launch.argv)
    argv[argv.index("--dtype") + 1] = "float32"
    return replace(launch, argv=argv)


def _run(
    result: Rehearsal,
    launches: list[Launch],
    port: int,
    work: Path,
    scenario: Scenario,
    config: DecoderConfig,
    options: Options,
    say: Say,
) -> None:
    say(f"starting SGLang: {result.command}")
    started = time.monotonic()
    with serving(launches, port, work) as server:
        server.wait()
        result.start_s = time.monotonic() - started
        say(f"ready after {result.start_s:.0f} s; asking {scenario.num_prompts} prompts")
        result.info = server.get("/server_info")
        client = HttpClient(server, config.max_positions, timeout_s=LONG_S)
        result.conversations = run_scenario(scenario, client)
        server.check_alive("ended")
        result.end_s = _kill_rank(server, client, launches) if options.end == "kill" else server.stop()
    result.problems += _info_problems(result, scenario.page)
    result.problems += [
        f"request {c.name!r}: {c.cached} tokens of its prompt were cached, {c.expect_cached} could have been"
        for c in result.conversations
        if c.cached < c.expect_cached
    ]


def _kill_rank(server: Server, client: HttpClient, launches: list[Launch]) -> float:
    """Kill the last rank while a request runs: the server must end, and leave no process."""
    import threading

    def ask() -> None:
        try:
            client.generate([1, 2, 3], 400)
        except VerificationFailed:
            return

    request = threading.Thread(target=ask, daemon=True)
    request.start()
    time.sleep(1)
    started = time.monotonic()
    tp = int(launches[0].argv[launches[0].argv.index("--tp-size") + 1])
    if not server.kill_rank(tp - 1):
        raise VerificationFailed(f"The process of rank {tp - 1} was not found.")
    seconds = server.wait_for_end(started, "a rank was killed")
    request.join(5)
    return seconds


def _info_problems(result: Rehearsal, page: int) -> Iterator[str]:
    """What the server says of itself against what was asked for."""
    wanted = {"device": "npu", "attention_backend": "ascend", "page_size": page, "model_impl": "mindspore"}
    for name, value in wanted.items():
        if result.info.get(name) != value:
            yield f"the server says {name} {result.info.get(name)!r}, not {value!r}"
    for state in result.info.get("internal_states", []):
        if compiles := state.get("msconv", {}).get("compiles_since_ready"):
            yield f"the server compiled {compiles} times since it was ready"


def _compare(
    result: Rehearsal,
    root: Path,
    manifest: Manifest,
    target: str,
    source: Path,
    work: Path,
    config: DecoderConfig,
) -> None:
    import torch

    if _weight_bytes(manifest) < SMALL_WORK:
        torch.set_num_threads(1)  # handing small work to threads costs more than the work
    expected = Expected(result.conversations, make_reference(source, manifest, target))
    rounding = half_precision_bound(target, expected.largest, config.layers)
    if not result.exact and config.moe is None:  # with experts there is none: others are chosen here and there
        result.bound = rounding
    expected.judge(result.bound)
    replayer = Replayer(root, manifest, target, result.exact, min(result.bound, rounding))
    replicas = read_replicas(work / "calls")
    if not replicas:
        raise VerificationFailed("The server ran none of the artifact's graphs.")
    for number_, ranks in enumerate(replicas):
        copy = f"copy {number_} of {len(replicas)}: " if len(replicas) > 1 else ""
        result.problems += [copy + p for p in _replay(result, replayer, ranks, manifest, root, expected)]
    result.answers = expected.answers
    result.problems += expected.answers.problems


def _replay(
    result: Rehearsal, replayer: Replayer, ranks: list[Rank], manifest: Manifest, root: Path, expected: Expected
) -> list[str]:
    """Check one copy of the model: what its ranks loaded, then their calls."""
    if [r.rank for r in ranks] != list(range(manifest.parallel.tp)):
        return [f"ranks {[r.rank for r in ranks]} ran, of {manifest.parallel.tp}"]
    graphs: dict[str, Graph] = {}
    problems = []
    for rank in ranks:
        for event in rank.of("graph"):
            phase = replayer.phase_of(rank, event["identity"])
            if phase is None:
                problems.append(
                    f"rank {rank.rank} loaded a graph that is none of the artifact's {replayer.target} ones"
                )
            else:
                graphs[event["identity"]] = replayer.graphs[phase]
    problems += loading_problems(root, manifest, graphs, ranks)
    page = int(result.info.get("page_size") or 0)
    found = Replay()
    expected.begin_copy()
    for where, rows, found in replayer.run(ranks, page):
        expected.compare(rows, where)
    total = result.replay
    total.num_calls += found.num_calls
    total.error = max(total.error, found.error)
    for phase, count in found.by_graph.items():
        total.by_graph[phase] = total.by_graph.get(phase, 0) + count
    return problems + found.problems


def _entry(
    result: Rehearsal, manifest: Manifest, scenario: Scenario, options: Options, sglang: str, mindspore: str
) -> Rehearsed | None:
    if not result.ok:
        return None
    return Rehearsed(
        target=result.target,
        weights_digest=manifest.weights.digest if manifest.weights else "",
        graph_digests=sorted(g.digest for g in manifest.graphs_for(result.target)),
        sglang=sglang,
        mindspore=mindspore,
        device=DEVICE_VERSION,
        mode="float32" if result.exact else "as served",
        flags=list(options.extra),
        page=scenario.page,
        prompts=scenario.num_prompts,
        tokens=result.answers.tokens,
        calls=dict(sorted(result.replay.by_graph.items())),
        max_call_error=result.replay.error,
        max_logit_error=result.answers.error,
        bound=result.bound if math.isfinite(result.bound) else 0.0,
        machines=options.machines,
        copies=copies(given_flags(list(options.extra))),
        ties=result.answers.ties,
        undecided=result.answers.undecided,
    )


def _record(root: Path, target: str, options: Options, entry: Rehearsed | None) -> None:
    """Put the rehearsal into the manifest, or take an earlier one of this target and layout out."""
    layout = (target, options.machines, copies(given_flags(list(options.extra))))
    with exclusive(root):
        manifest = read_manifest(root)
        kept = [r for r in manifest.rehearsed if (r.target, r.machines, r.copies) != layout]
        kept = sorted([*kept, *([entry] if entry else [])], key=lambda r: (r.target, r.machines, r.copies))
        if kept != manifest.rehearsed:
            write_manifest(root, msgspec.structs.replace(manifest, rehearsed=kept))

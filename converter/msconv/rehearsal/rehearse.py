"""Rehearsing an artifact: start, ask, stop, compare, record."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msconv_runtime import __version__
from msconv_runtime.artifact import Artifact, Rehearsed
from msconv_runtime.errors import UsageError, VerificationFailed

from ..graph.toolchain import mindspore_version
from ..workspace.lock import exclusive
from .build import build_device
from .client import LONG, HttpClient
from .judgement import Rehearsal, compare
from .plan import Options, Plan, make_plan
from .protocol import Device
from .scenario import run_scenario
from .server import DEVICE_VERSION, FAILURES, Server, prepare, serving, sglang_version

MEMORY = 64 << 30  # of each device, as SGLang sees it
ANSWER_S = 1800  # for one answer

Say = Callable[[str], None]


def rehearse(root: Path, options: Options, say: Say = lambda text: None) -> Rehearsal:
    """Serve the artifact on the rehearsal device and hold all that the server did against what it means.  A failed
    rehearsal removes an earlier one of the same layout.

    Raises EnvironmentProblem without a compiler or SGLang, what `make_plan` raises, and VerificationFailed if the
    server does not start, answer or end, and its calls do not say why."""
    started = time.monotonic()
    sglang, mindspore = sglang_version(), mindspore_version()
    plan = make_plan(root.resolve(), options)
    result = Rehearsal(plan.target.name, plan.exact, plan.launches[0].shell())
    try:
        with _directory(options.keep) as work:
            failure = _run(plan, result, work, say)
            say("comparing with transformers and with the interpreter")
            compare(plan, result, work, failure)
    except VerificationFailed:
        _record(plan, None)
        raise
    result.seconds = time.monotonic() - started
    _record(plan, _entry(plan, result, sglang, mindspore) if result.ok else None)
    return result


@contextmanager
def running(plan: Plan, work: Path, say: Say = lambda text: None) -> Iterator[Server]:
    """The server of a plan on the rehearsal device, in an empty directory; it answers when the block begins."""
    say("preparing the rehearsal device (the first time it is built: half a minute)")
    assert plan.target.chip is not None
    name, arch = plan.target.chip
    prepare(work, Device(str(build_device()), plan.devices, MEMORY, name, arch, plan.exact))
    say(f"starting SGLang: {plan.launches[0].shell()}")
    if plan.exact:
        say("  with --dtype float32: graphs compute exactly, in a KV pool that rounds nothing")
    with serving(plan.started, plan.port, work) as server:
        server.wait()
        yield server


def _run(plan: Plan, result: Rehearsal, work: Path, say: Say) -> VerificationFailed | None:
    """Ask all, and stop.  What failed, if the server did not get to its end."""
    started = time.monotonic()
    try:
        with running(plan, work, say) as server:
            result.start_s = time.monotonic() - started
            say(f"ready after {result.start_s:.0f} s; asking {plan.scenario.num_prompts} prompts")
            client = HttpClient(server, plan.config.max_positions, ANSWER_S)
            run_scenario(plan.scenario, client, result.conversations.append)
            result.info = server.info()
            result.end_s = _kill_rank(server, client, plan) if plan.options.end == "kill" else server.stop()
    except VerificationFailed as e:
        return e
    return None


def _kill_rank(server: Server, client: HttpClient, plan: Plan) -> float:
    """Kill the last rank when an answer has begun: the server must end, and leave no process."""
    last = plan.artifact.tp - 1
    with suppress(*FAILURES), client.stream([1], max(1, min(LONG, plan.config.max_positions - 8))) as parts:
        next(parts, None)
        started = time.monotonic()
        if not server.kill_rank(last):
            raise VerificationFailed(f"The process of rank {last} was not found.")
        return server.wait_for_end(started, "a rank was killed")
    raise VerificationFailed("The request during which a rank was to be killed failed.")


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


def _entry(plan: Plan, result: Rehearsal, sglang: str, mindspore: str) -> Rehearsed:
    weights, graphs = plan.artifact.weights, plan.artifact.graphs(plan.target.name)
    return Rehearsed(
        target=plan.target.name,
        weights_digest=weights.digest if weights else "",
        graph_digests=sorted(g.digest for g in graphs),
        sglang=sglang,
        mindspore=mindspore,
        device=DEVICE_VERSION,
        mode="float32" if plan.exact else "as served",
        flags=list(plan.options.extra),
        page=plan.scenario.page,
        prompts=plan.scenario.num_prompts,
        tokens=result.answers.tokens,
        calls=dict(sorted(result.replay.by_graph.items())),
        max_call_error=result.replay.error,
        max_logit_error=result.answers.error,
        bound=result.bound or 0.0,
        machines=plan.options.machines,
        copies=plan.options.copies,
        end=plan.options.end,
        msconv=__version__,
        ties=result.answers.ties,
        undecided=result.answers.undecided,
    )


def _record(plan: Plan, entry: Rehearsed | None) -> None:
    """Put the rehearsal into the manifest, or take an earlier one of this target and layout out.  One that asked
    less than an earlier one, and agreed, does not take its place."""
    layout = (plan.target.name, plan.options.machines, plan.options.copies, plan.options.end)
    with exclusive(plan.artifact.root):
        artifact = Artifact(plan.artifact.root)
        manifest = artifact.manifest
        kept = [r for r in manifest.rehearsed if _layout(r) != layout]
        before = [r for r in manifest.rehearsals_for(plan.target.name) if _layout(r) == layout]
        best = max([entry, *before], key=_strength) if entry else None  # of equal ones the new one
        kept = sorted([*kept, *([best] if best else [])], key=_layout)
        if kept != manifest.rehearsed:
            artifact.changed(rehearsed=kept)


def _layout(entry: Rehearsed) -> tuple[str, int, int, str]:
    return entry.target, entry.machines, entry.copies, entry.end


def _strength(entry: Rehearsed) -> tuple[bool, int]:
    return entry.mode == "float32", entry.prompts

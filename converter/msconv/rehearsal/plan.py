"""What a rehearsal will do, decided and checked before anything starts: target, scenario, commands, size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.integrity import refuse_damage
from msconv_runtime.doctor import Machine
from msconv_runtime.errors import ResourceError, UsageError
from msconv_runtime.roles import gives_all_logits
from msconv_runtime.serving.choice import target_to_serve
from msconv_runtime.serving.flags import given_flags, number
from msconv_runtime.serving.launch import Launch, plan_launch
from msconv_runtime.serving.nodes import Nodes
from msconv_runtime.serving.ports import refuse_taken
from msconv_runtime.serving.settings import LOCALHOST, Settings
from msconv_runtime.sglang.engine import ENGINE
from msconv_runtime.sglang.speculation import ALGORITHM, STANDALONE, drafts
from msconv_runtime.targets import TARGETS, Target

from ..checkpoint.reference import configuration
from ..families import DecoderConfig
from ..verify.reference import source_of
from .scenario import Scenario, make_scenario
from .server import free_port

KIND = "npu"  # of the devices that a rehearsal stands in for
SMALL_BYTES = 2 << 30  # of weights, of all ranks, up to which graphs compute in float32 unless told otherwise
POOL_PAGES = 16  # of the KV pool, unless flags say otherwise: so few that the radix cache must give some back
POOL_TOKENS = 1024  # and so many tokens at least
OURS = {  # flags of SGLang that a rehearsal decides, and how
    "--port": "--port of `msconv rehearse`",
    "--host": "loopback only",
    "--nnodes": "--nnodes of `msconv rehearse`",
    "--node-rank": "--nnodes of `msconv rehearse`",
    "--dist-init-addr": "--nnodes of `msconv rehearse`",
    "--model-path": "ARTIFACT",
    "--model": "ARTIFACT",
    "--dtype": "--exact or --no-exact",
    "--kv-cache-dtype": "--exact or --no-exact",
}
DRAFT_TOKENS, USUAL_DRAFTS = "--speculative-num-draft-tokens", 8  # SGLang takes no more by itself
LONG_S = 1800  # of interpreting, from which on the number of prompts must be given
SECONDS_A_VALUE = {True: 1.2e-9, False: 4e-9}  # of a weight in a call, exact or not: an estimate for 2 cores


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

    @property
    def copies(self) -> int:
        return ENGINE.copies(given_flags(list(self.extra)))


@dataclass(frozen=True)
class Plan:
    """`launches`: the command of each machine; the first one listens at `port`.  `source`: of the reference.
    `draft`: what guesses tokens, `most_drafts` at a time; the artifact itself may have it."""

    artifact: Artifact
    target: Target
    config: DecoderConfig
    scenario: Scenario
    exact: bool
    launches: list[Launch]
    port: int
    source: Path
    options: Options
    draft: Artifact | None = None
    most_drafts: int = 0

    @property
    def devices(self) -> int:
        """How many each machine has."""
        return self.artifact.tp * self.options.copies // self.options.machines

    @property
    def started(self) -> list[Launch]:
        """What is really started: in exact mode, with a KV pool that rounds nothing."""
        return [_with_float32(launch) for launch in self.launches] if self.exact else self.launches


def make_plan(root: Path, options: Options) -> Plan:
    """Raises EnvironmentProblem if the port is taken; ArtifactError or UsageError for an artifact that has nothing
    for an NPU, is damaged, or does not fit the flags; ResourceError if interpreting it would take too much."""
    given = given_flags(list(options.extra))
    if wrong := [f"{name} ({OURS[name]})" for name in given if name in OURS]:
        raise UsageError(f"A rehearsal decides these itself: {', '.join(wrong)}.", "Leave them out behind --.")
    artifact = Artifact(root)
    target = _target_named(options.target) if options.target else target_to_serve(artifact, KIND)
    graphs = artifact.graphs(target.name)
    weights = artifact.weights.nbytes
    config = configuration(artifact)
    refuse_damage(artifact)
    exact = options.exact if options.exact is not None else weights <= SMALL_BYTES
    page = ENGINE.pool(artifact, target, given).page
    all_logits = gives_all_logits(graphs)
    scenario = make_scenario(config.vocab, config.max_positions, page, options.prompts, all_logits)
    if options.copies > 1 or given.keys() & {"--disable-radix-cache", "--max-total-tokens"}:
        scenario = replace(scenario, expects_cache=False)
    launches, port = _launches(artifact, target, scenario, options)
    _refuse_size(artifact, config, scenario, exact, options)
    source = source_of(root, options.reference)
    draft = _draft_of(artifact, given)
    most = (number(given, DRAFT_TOKENS) or USUAL_DRAFTS) if draft else 0
    return Plan(artifact, target, config, scenario, exact, launches, port, source, options, draft, most)


def _draft_of(artifact: Artifact, given: dict[str, str]) -> Artifact | None:
    """What guesses tokens.  Raises UsageError for a model that is to guess for itself: whose calls are whose could
    not be told."""
    if ALGORITHM not in given:
        return None
    draft = (drafts(given) or [artifact])[0]
    if given[ALGORITHM].upper() == STANDALONE and draft.root.resolve() == artifact.root.resolve():
        raise UsageError(
            f"{draft.root}: drafts for itself, and a rehearsal could not tell one's calls from the other's.",
            "Rehearse with a copy of the directory as the draft.",
        )
    return draft


def _target_named(name: str) -> Target:
    """Raises UsageError unless it is one for NPUs."""
    known = {t.name: t for t in TARGETS.values() if t.chip}
    if name not in known:
        raise UsageError(
            f"--target {name}: a rehearsal is of an NPU's graphs.", f"Targets are: {', '.join(known)}."
        )
    return known[name]


def _refuse_size(
    artifact: Artifact, config: DecoderConfig, scenario: Scenario, exact: bool, options: Options
) -> None:
    """Raises ResourceError if the interpreter would want more memory than there is, or very long for a scenario
    that nobody chose."""
    values = artifact.tp * sum(math.prod(t.shape) for t in artifact.weights.tensors)
    need, free = values * (6 if exact else 4) * options.copies, Machine().memory()
    if free is not None and need > free:
        raise ResourceError(
            f"Interpreting this artifact takes about {need / 2**30:.1f} GiB of memory; {free / 2**30:.1f} GiB are "
            "free.",
            "Rehearse a model of the same family with fewer layers: its way through the server is the same.  "
            "--no-exact takes a third less.",
        )
    a_call = 2 * values * SECONDS_A_VALUE[exact]  # in the server, and once more
    seconds = a_call * scenario.num_calls
    if seconds > LONG_S and not options.prompts:
        one = make_scenario(config.vocab, config.max_positions, scenario.page, 1)
        raise ResourceError(
            f"Interpreting this artifact would take about {seconds / 60:.0f} minutes: {scenario.num_prompts} "
            f"prompts, {scenario.num_calls} calls of {a_call:.1f} s.",
            f"`--prompts 1` takes about {a_call * one.num_calls / 60:.0f} minutes, "
            f"`--prompts {scenario.num_prompts}` all of it.",
        )


def _launches(
    artifact: Artifact, target: Target, scenario: Scenario, options: Options
) -> tuple[list[Launch], int]:
    """The command of each machine, and the port of the first.  A few flags keep the server small, unless given."""
    port = options.port or free_port()
    refuse_taken(LOCALHOST, port)
    chunk = max(scenario.page, (scenario.longest - 1) // scenario.page * scenario.page)
    usual = {
        "--max-total-tokens": str(max(POOL_PAGES * scenario.page, POOL_TOKENS)),
        "--chunked-prefill-size": str(chunk),
        "--max-running-requests": "16",
        "--skip-tokenizer-init": "",
    }
    given = given_flags(list(options.extra))
    added = [word for name, value in usual.items() if name not in given for word in (name, value) if word]
    meeting = f"{LOCALHOST}:{free_port()}" if options.machines > 1 else None
    launches = [
        plan_launch(
            artifact.root,
            target.kind,
            LOCALHOST,
            port if machine == 0 else free_port(),
            [*added, *options.extra],
            Settings(),
            Nodes(options.machines, machine, meeting),
            elsewhere=True,
            target=target.name,
            engine=ENGINE,
        )
        for machine in range(options.machines)
    ]
    return launches, port


def _with_float32(launch: Launch) -> Launch:
    argv = list(launch.argv)
    argv[argv.index("--dtype") + 1] = "float32"
    return replace(launch, argv=argv)

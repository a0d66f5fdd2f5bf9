"""The outcome of a rehearsal: what the server said, answered and ran, held against what it means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msconv_runtime.artifact import Graph
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.weights import required

from ..verify.compare import FLOAT32_BOUND, half_precision_bound
from .answers import Answers, Expected, make_reference
from .loading import loading_problems
from .plan import Plan
from .records import CALLS, Rank, read_replicas
from .replay import Replay, Replayer
from .scenario import Conversation

SMALL_WORK = 64 << 20  # bytes of weights


@dataclass
class Rehearsal:
    """The outcome.  `problems`: what is wrong, the first first.  `bound`: of logits against transformers', None
    where rounding chooses other experts and there is none."""

    target: str
    exact: bool
    command: str
    bound: float | None = None
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
        judged = self.answers.tokens > self.answers.undecided
        return judged and not self.problems


def compare(plan: Plan, result: Rehearsal, work: Path, failure: VerificationFailed | None) -> None:
    """Find every problem.  `failure`: the server did not get to its end; raised again if no call says why."""
    import torch

    if sum(f.size for f in required(plan.root, plan.manifest).files) < SMALL_WORK:
        torch.set_num_threads(1)  # handing small work to threads costs more than the work
    replicas = read_replicas(work / CALLS)
    whole = failure is None and plan.options.end == "term"
    reference = make_reference(plan.source, plan.manifest, plan.target)
    expected = Expected(result.conversations, reference, complete=whole)
    rounding = half_precision_bound(plan.target, expected.largest, plan.config.layers)
    if plan.exact:
        result.bound = FLOAT32_BOUND
    elif plan.config.moe is None:
        result.bound = rounding
    expected.judge(float("inf") if result.bound is None else result.bound)
    replayer = Replayer(plan.root, plan.manifest, plan.target, plan.exact, result.bound or rounding)
    for number, ranks in enumerate(replicas):
        copy = f"copy {number} of {len(replicas)}: " if len(replicas) > 1 else ""
        result.problems += [copy + p for p in _replay(plan, result, replayer, ranks, expected, whole)]
    result.answers = expected.answers
    result.problems += expected.answers.problems
    if failure is not None:
        if not result.problems:
            raise failure
        result.problems.append(failure.message)
        return
    if not replicas:
        result.problems.append("the server ran none of the artifact's graphs")
    result.problems += _info_problems(result.info, plan)
    result.problems += [
        f"request {c.name!r}: {c.cached} tokens of its prompt were cached, {c.expect_cached} could have been"
        for c in result.conversations
        if c.cached < c.expect_cached and plan.options.copies == 1  # copies have caches of their own
    ]


def _info_problems(info: dict[str, Any], plan: Plan) -> Iterator[str]:
    """What the server says of itself against what was asked for."""
    wanted = {
        "device": "npu",
        "attention_backend": "ascend",
        "page_size": plan.scenario.page,
        "model_impl": "mindspore",
    }
    for name, value in wanted.items():
        if info.get(name) != value:
            yield f"the server says {name} {info.get(name)!r}, not {value!r}"
    for state in info.get("internal_states", []):
        if compiles := state.get("msconv", {}).get("compiles_since_ready"):
            yield f"the server compiled {compiles} times since it was ready"


def _replay(
    plan: Plan, result: Rehearsal, replayer: Replayer, ranks: list[Rank], expected: Expected, whole: bool
) -> list[str]:
    """The problems of one copy of the model: of what its ranks loaded, then of their calls.  `whole`: it was ended
    in order, so all ranks must have made the same calls."""
    if [r.rank for r in ranks] != list(range(plan.manifest.parallel.tp)):
        return [f"ranks {[r.rank for r in ranks]} ran, of {plan.manifest.parallel.tp}"]
    graphs: dict[str, Graph] = {}
    problems = []
    for rank in ranks:
        for event in rank.of("graph"):
            phase = replayer.phase_of(rank, event["identity"])
            if phase is None:
                problems.append(
                    f"rank {rank.rank} loaded a graph that is none of the artifact's for {plan.target}"
                )
            else:
                graphs[event["identity"]] = replayer.graphs[phase]
    problems += loading_problems(plan.root, plan.manifest, graphs, ranks)
    expected.begin_copy()
    found = replayer.run(ranks, plan.scenario.page, expected.compare, whole)
    result.replay.add(found)
    return problems + found.problems

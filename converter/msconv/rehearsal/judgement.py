"""The outcome of a rehearsal: what the server said, answered and ran, held against what it means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msconv_runtime.errors import VerificationFailed

from ..verify.comparison import FLOAT32_BOUND, half_precision_bound
from ..verify.int8.run import free_kl
from .answers import Answers, Expected, make_reference
from .loading import device_problems, loading_problems
from .plan import Plan
from .protocol import CALLS
from .records import Rank, read_replicas
from .replay import Replay, Replayer
from .scenario import Conversation, answer_problems

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
        return not self.problems


def compare(plan: Plan, result: Rehearsal, work: Path, failure: VerificationFailed | None) -> None:
    """Find every problem.  `failure`: the server did not get to its end; raised again if no call says why."""
    import torch

    if plan.artifact.weights.nbytes < SMALL_WORK:
        torch.set_num_threads(1)  # handing small work to threads costs more than the work
    in_order = failure is None and plan.options.end == "term"
    reference = make_reference(plan.source, plan.artifact.manifest, plan.target.name)
    expected = Expected(result.conversations, reference, plan.config.vocab, in_order, plan.most_drafts)
    if expected.rounds_by_itself:
        pass  # a code that goes the other way moves logits by 1e-2
    elif plan.exact:
        result.bound = FLOAT32_BOUND
    elif plan.config.moe is None:
        result.bound = half_precision_bound(plan.target, expected.largest, plan.config.layers)
    expected.judge(math.inf if result.bound is None else result.bound)
    result.problems += _copies_problems(plan, result, work, expected, in_order)
    expected.finish()
    result.answers = expected.answers
    result.problems += expected.answers.problems
    free = free_kl(plan.config.moe is not None)
    if plan.exact and (kl := result.answers.kl) is not None and not kl < free:
        result.problems.append(
            f"logits of the calls diverge from the int8 reference's by {kl:.2e} nats in the mean (bound "
            f"{free:.0e})"
        )
    if failure is not None:
        if not result.problems:
            raise failure
        result.problems.append(failure.message)
        return
    result.problems += answer_problems(result.conversations, plan.scenario)
    result.problems += _info_problems(result.info, plan)
    if result.answers.undecided >= result.answers.tokens:
        result.problems.append(
            f"{result.answers.undecided} tokens come after a router's tie, only {result.answers.tokens} could be "
            "judged"
        )
    if any(c.logprobs for c in result.conversations) and not result.answers.logprobs:
        result.problems.append(
            "no log probability of a prompt could be compared: routers' ties, or a large vocabulary"
        )
    needed = {"prefill", "verify" if plan.draft else "decode"}
    if needed - result.replay.by_graph.keys():
        result.problems.append(f"the server ran only these graphs: {', '.join(result.replay.by_graph) or 'none'}")


def _copies_problems(
    plan: Plan, result: Rehearsal, work: Path, expected: Expected, in_order: bool
) -> Iterator[str]:
    """What is wrong in each copy of the model (`--dp-size`), by its ranks' records."""
    replayer = Replayer(plan.artifact, plan.target, plan.exact, FLOAT32_BOUND, plan.draft)
    replicas = read_replicas(work / CALLS)
    if in_order and len(replicas) != plan.options.copies:
        yield f"{len(replicas)} copies of the model ran, of {plan.options.copies}"
    yield from device_problems(replicas, plan.options.machines)
    for number, ranks in enumerate(replicas):
        copy = f"copy {number} of {len(replicas)}: " if len(replicas) > 1 else ""
        yield from (copy + p for p in _replay(plan, result, replayer, ranks, expected, in_order))
        if in_order and not expected.asked:
            yield f"{copy}no request was answered by it; more --prompts may reach it"


def _info_problems(info: dict[str, Any], plan: Plan) -> Iterator[str]:
    """What the server says of itself against what was asked for."""
    wanted = {
        "device": "npu",
        "attention_backend": "ascend",
        "page_size": plan.scenario.page,
        "model_impl": "mindspore",
        "tp_size": plan.artifact.tp,
        "ep_size": plan.artifact.ep,
        "dp_size": plan.options.copies,
    }
    for name, value in wanted.items():
        if info.get(name) != value:
            yield f"the server says {name} {info.get(name)!r}, not {value!r}"
    for state in info.get("internal_states", [{}]):
        if (compiles := state.get("msconv", {}).get("compiles_since_ready")) is None:
            yield "the server does not say how often it has compiled since it was ready"
        elif compiles:
            yield f"the server compiled {compiles} times since it was ready"


def _replay(
    plan: Plan, result: Rehearsal, replayer: Replayer, ranks: list[Rank], expected: Expected, in_order: bool
) -> list[str]:
    """The problems of one copy of the model: of what its ranks loaded, then of their calls.  `in_order`: it was
    ended by SIGTERM, so all ranks must have made the same calls."""
    if [r.rank for r in ranks] != list(range(plan.artifact.tp)):
        return [] if not in_order else [f"ranks {[r.rank for r in ranks]} ran, of {plan.artifact.tp}"]
    loaded = replayer.loaded(ranks)
    problems = [
        f"rank {rank.rank} loaded a graph that is none of the artifact's for {plan.target.name}"
        for rank in ranks
        for event in rank.of("graph")
        if (rank.rank, event["number"]) not in loaded
    ]
    problems += loading_problems(plan.artifact, loaded, ranks)
    expected.begin_copy()
    found = replayer.run(ranks, plan.scenario.page, expected.compare, in_order)
    result.replay.add(found)
    return problems + found.problems

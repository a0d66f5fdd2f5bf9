"""The proof of int8 graphs: candidates run first, in the interpreter, and the reference is led by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..compare import closest_judged, draw
from ..comparison import FLOAT32_BOUND, Comparison, largest_error
from ..drafting import Drafting, case_of, diverging
from ..lockstep import Lockstep
from ..reference import Trace
from ..scenario import DECODE_STEPS, Candidate, Lengths, Seen, play
from ..telling import Tell, quietly
from .codes import Record
from .drafts import compare_led_draft
from .drift import agreement, divergence
from .lead import Verdict
from .reference import QuantisedReference

# Of a server's own run, which rounds by itself: measured 2e-5 and less; with experts, where a code that goes the
# other way can send a token to another expert, 1.3e-3.  A fault is 1e-1 and up.
FREE_KL, FREE_KL_OF_EXPERTS = 1e-3, 1e-2


@dataclass(frozen=True)
class Session:
    """A server's own run, in MindSpore, against the interpreter's: each rounds by itself, so that logits of rows
    behind a code that went the other way differ by 1e-2."""

    max_abs_logit_error: float
    argmax_agreement: float
    kl: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.kl < self.bound


@dataclass
class Led:
    """By candidate, "" for the first: what was to say of its codes, of the server's run, of a draft's graphs."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    drafts: dict[str, Session] = field(default_factory=dict)
    apart: str = ""

    @property
    def compared(self) -> int:
        return sum(v.compared for v in self.verdicts.values())

    @property
    def led(self) -> int:
        return sum(v.led for v in self.verdicts.values())

    @property
    def unexplained(self) -> int:
        return sum(v.unexplained for v in self.verdicts.values())

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """(compared, led) of each layer's `self_attn` and `mlp`, over all candidates."""
        found: dict[str, tuple[int, int]] = {}
        for verdict in self.verdicts.values():
            for group, (compared, led) in verdict.groups.items():
                before = found.get(group, (0, 0))
                found[group] = (before[0] + compared, before[1] + led)
        return found

    @property
    def share(self) -> float:
        return self.led / self.compared if self.compared else 0.0

    @property
    def place(self) -> str:
        """Of the first thing that is wrong with codes."""
        if self.apart:
            return self.apart
        for name, verdict in self.verdicts.items():
            if verdict.place:
                return verdict.place + (f" ({name})" if name else "")
        for name, session in self.sessions.items():
            if not session.ok:
                return f"the server's own run{f' ({name})' if name else ''} differs from the interpreter's"
        for name, draft in self.drafts.items():
            if not draft.ok:
                return f"the draft{f' ({name})' if name else ''} differs from the reference's"
        return ""

    @property
    def settings(self) -> dict[str, str | int | float]:
        """As a manifest and `--json` have it."""
        found: dict[str, str | int | float] = {
            "codes_compared": self.compared,
            "codes_led": self.led,
            "codes_unexplained": self.unexplained,
        }
        for group, (compared, led) in self.groups.items():
            found[f"led_share {group}"] = led / compared if compared else 0.0
        prefixes = [(f"session_{name}_" if name else "session_", s) for name, s in self.sessions.items()]
        prefixes += [(f"draft_{name}_" if name else "draft_", s) for name, s in self.drafts.items()]
        for prefix, session in prefixes:
            found |= {
                f"{prefix}max_abs_logit_error": session.max_abs_logit_error,
                f"{prefix}argmax_agreement": session.argmax_agreement,
                f"{prefix}kl": session.kl,
                f"{prefix}kl_bound": session.bound,
            }
        return found

    @property
    def ok(self) -> bool:
        runs = (*self.sessions.values(), *self.drafts.values())
        sound = all(v.ok for v in self.verdicts.values()) and all(s.ok for s in runs)
        return bool(self.verdicts) and sound and not self.apart


def compare_led(
    candidates: Mapping[str, Callable[[], Lockstep]],
    sessions: Mapping[str, Callable[[], Candidate]],
    reference: QuantisedReference,
    vocab: int,
    max_positions: int,
    steps: int = DECODE_STEPS,
    tell: Tell = quietly,
    drafting: Drafting | None = None,
) -> tuple[Comparison, Led]:
    """Run the scenario in each of `candidates`, by name, as long as nothing is wrong; then the server's own in
    `sessions`, by the name of the candidate that it must be like.  `drafting`: a draft's graphs, last."""
    rng = np.random.default_rng(0)
    result, led = Comparison(FLOAT32_BOUND), Led()
    sequences: list[list[int]] = []
    lengths: Lengths | None = None
    for name, make in candidates.items():
        if led.verdicts and not (led.ok and (result.ok or result.ok_but_for_ties)):
            break
        candidate = make()
        if lengths is None:
            lengths = Lengths.within(max_positions, steps, getattr(candidate, "has_all_tokens", False))
            sequences, _ = draw(reference, lengths.totals, vocab, rng)
        seen, record = listen(candidate, name, sequences, lengths, reference, tell)
        traces, verdict = reference.led_traces(sequences, record)
        led.verdicts[name], led.apart = verdict, led.apart or record.apart
        for step in seen:
            result.add_step(step, traces)
        result.apart = max(result.apart, candidate.apart)
        result.closest_routing = min(result.closest_routing, closest_judged(traces))
        if name in sessions and led.ok and result.ok:
            own = play(sessions[name](), f"{name} server's ".lstrip(), sequences, lengths, tell)
            led.sessions[name] = against(list(own), seen, traces, free_kl(reference.moe is not None))
    if drafting is not None and lengths is not None and led.ok and result.ok:
        _compare_drafts(result, led, sequences, lengths, reference, drafting)
    return result, led


def _compare_drafts(
    result: Comparison,
    led: Led,
    sequences: list[list[int]],
    lengths: Lengths,
    reference: QuantisedReference,
    drafting: Drafting,
) -> None:
    """Lead the draft's graphs too; then the server's own run of them, which rounds by itself."""
    states = [t.hidden for t in reference.traces(sequences)]
    case = case_of(drafting.reference, sequences, states, lengths)
    for variant, make in drafting.interpreted.items():
        name = f"{variant} draft".strip()
        led.verdicts[name], apart = compare_led_draft(result, case, make(), name, drafting.reference)
        led.apart = led.apart or apart
        if not (led.ok and result.ok):
            return
    for variant, (wanted, found) in diverging(case, drafting).items():
        led.drafts[variant] = _apart(wanted, found, free_kl(reference.moe is not None))


def listen(
    candidate: Lockstep,
    name: str,
    sequences: list[list[int]],
    lengths: Lengths,
    reference: QuantisedReference,
    tell: Tell = quietly,
) -> tuple[list[Seen], Record]:
    """Run a candidate; its calls and its codes."""
    moe, parallel = reference.moe, reference.parallel
    shape = (len(sequences), max(map(len, sequences)))
    record = Record(shape, parallel.tp, parallel.ep, moe.experts if moe else 0)
    candidate.hear(record)
    seen = []
    for step in play(candidate, f"{name} " if name else "", sequences, lengths, tell):
        record.place(step.places, step.phase)
        seen.append(step)
    candidate.hear(None)
    return seen, record


def free_kl(has_experts: bool) -> float:
    """How far, in nats, logits may be from others' that round by themselves."""
    return FREE_KL_OF_EXPERTS if has_experts else FREE_KL


def against(own: list[Seen], others: list[Seen], traces: list[Trace], bound: float) -> Session:
    """A server's calls against the interpreter's, in rows whose routing is decided.  The server may have no graph
    of all tokens' logits."""
    pairs = [
        (a, b)
        for mine, other in zip(own, others, strict=False)
        for (i, position), a, b in zip(mine.rows, mine.logits, other.logits, strict=False)
        if position < traces[i].decided
    ]
    found: NDArray[np.float32] = np.stack([a for a, _ in pairs])
    wanted: NDArray[np.float32] = np.stack([b for _, b in pairs])
    return _apart(wanted, found, bound)


def _apart(wanted: NDArray[np.float32], found: NDArray[np.float32], bound: float) -> Session:
    return Session(largest_error(found, wanted), agreement(wanted, found), divergence(wanted, found), bound)

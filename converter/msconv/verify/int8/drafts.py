"""The proof of a draft's int8 graphs: led as the model's are, where the interpreter runs them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..comparison import Comparison
from ..drafting import Case, LayerReference, judge, run
from ..lockstep import Lockstep
from .codes import Record
from .lead import Verdict
from .reference import QuantisedReference


def compare_led_draft(
    result: Comparison, case: Case, candidate: Lockstep, name: str, drafting: LayerReference
) -> tuple[Verdict, str]:
    """Add to `result` what the candidate does; what there was to say of its codes, and where ranks differ.

    Tokens that follow the draft's own hidden states follow the candidate's, on both sides."""
    reference = drafting.reference
    assert isinstance(reference, QuantisedReference)
    moe, parallel = reference.moe, reference.parallel
    shape = (len(case.tokens), max(map(len, case.tokens)))
    record = Record(shape, parallel.tp, parallel.ep, moe.experts if moe else 0)
    candidate.hear(record)
    steps = []
    for step in run(case, candidate, name):
        record.place(step.places, step.phase)
        steps.append(step)
    candidate.hear(None)
    hidden = [np.zeros((len(tokens), steps[0].given.shape[1]), np.float32) for tokens in case.tokens]
    for step in steps:
        for (i, position), row in zip(step.places, step.given, strict=True):
            hidden[i][position] = row
    reference.lead.begin(record)
    try:
        traces = drafting.run(case.tokens, hidden)
        verdict = reference.lead.verdict([t.decided for t in traces], [len(t) for t in case.tokens])
    finally:
        reference.lead.begin(None)
    judge(result, replace(case, hidden=hidden, traces=traces), steps)
    result.apart = max(result.apart, candidate.apart)
    return verdict, record.apart

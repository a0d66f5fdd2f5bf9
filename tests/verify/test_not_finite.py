"""Logits and results that are no numbers: they agree with nothing, prove nothing, and are said to be there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msconv.cli.verify import _failure
from msconv.verify import subject
from msconv.verify.comparison import Comparison, relative_error
from msconv.verify.int8.drift import Drift, agreement, divergence, measure
from msconv.verify.reference import Trace
from msconv.verify.result import Proof
from msconv_runtime.targets import target_named

NAN, INF = float("nan"), float("inf")
VOCAB = 8
NORMS = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
SOUND = Comparison(1e-4, agreeing=4, decided=4)


def trace(tokens: int, bad: dict[str, int] | None = None, value: float = NAN) -> Trace:
    """A sequence; `bad`: from which token on a norm, or the logits, are `value`."""
    rng = np.random.default_rng(tokens)
    parts = {name: rng.normal(size=(tokens, VOCAB)).astype(np.float32) for name in (*NORMS, "logits")}
    for name, token in (bad or {}).items():
        parts[name][token:] = value
    logits = parts.pop("logits")
    return Trace(logits, parts, np.full(tokens, np.inf, np.float32))


class Model:
    """A reference that gives these traces."""

    def __init__(self, after: dict[str, int], before: dict[str, int], value: float) -> None:
        self.weights = SimpleNamespace(is_made=False)
        self.after, self.before, self.value = after, before, value

    def traces(self, windows: list[list[int]]) -> list[Trace]:
        return [trace(len(w), self.after if i else {}, self.value) for i, w in enumerate(windows)]

    def traces_of_values(self, windows: list[list[int]]) -> list[Trace]:
        return [trace(len(w), self.before if i else {}, self.value) for i, w in enumerate(windows)]


def drift(tmp_path: Path, after: dict[str, int], before: dict[str, int], value: float = NAN) -> Drift:
    """Over 256 tokens in windows of 100, of which the second is bad."""
    (tmp_path / "config.json").write_text("{}")
    model: Any = Model(after, before, value)
    return measure(tmp_path, SimpleNamespace(), model, None, VOCAB, 100)  # type: ignore[arg-type]


def test_a_drift_of_numbers_says_nothing(tmp_path: Path) -> None:
    found = drift(tmp_path, {}, {})
    assert (found.not_finite, found.kl, found.argmax_agreement) == ("", 0.0, 1.0)
    assert Proof("cpu", 1, SOUND, [], [], 0.0, drift=found).ok


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("whose", ["the int8 model", "the values of the source's codes"])
def test_a_drift_that_is_not_finite_is_no_proof_and_names_the_place(
    tmp_path: Path, whose: str, value: float
) -> None:
    bad = {NORMS[1]: 3, "logits": 7}
    found = drift(tmp_path, *((bad, {}) if "int8" in whose else ({}, bad)), value)
    assert found.not_finite == (
        f"the logits of {whose} are not finite, first of token 107 of random tokens, by model.layers.0.self_attn, "
        f"seen at {NORMS[1]}"
    )
    proof = Proof("cpu", 1, SOUND, [], [], 0.0, drift=found)
    assert not proof.ok
    assert proof.place == found.not_finite
    assert f"agree with the reference, but {found.not_finite}." in _failure(tmp_path, proof).message
    assert found.argmax_agreement < 1


def test_logits_alone_and_results_alone_can_be_not_finite(tmp_path: Path) -> None:
    assert "by lm_head" in drift(tmp_path, {"logits": 0}, {}).not_finite
    huge = drift(tmp_path, {"logits": 0}, {"logits": 0}, 1e30)
    assert huge.not_finite == ""
    model: Any = Model({}, {}, NAN)
    model.traces = lambda windows: [replace(trace(len(w)), logits=trace(len(w)).logits * 1e30) for w in windows]
    found = measure(tmp_path, SimpleNamespace(), model, None, VOCAB, 100)  # type: ignore[arg-type]
    assert found.not_finite == "the perplexity of the int8 model is inf: not finite"


def test_rounding_makes_no_divergence_negative() -> None:
    """Or the manifest would contradict itself: 208 of 500 such draws were, by some 1e-17."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.normal(0, 1, (20, 200)).astype(np.float32)
        q = p.copy()
        q[rng.integers(0, 20, 5), rng.integers(0, 200, 5)] *= np.float32(1 + 1e-7)
        assert divergence(p, q) >= 0
    with np.errstate(invalid="ignore"):
        assert np.isnan(divergence(p, np.full_like(p, NAN)))
    assert agreement(np.full_like(p, NAN), np.full_like(p, NAN)) == 0.0


@pytest.mark.parametrize("expected", [[0.0, 2.0], [1.0, 1.0], [NAN, NAN]])  # decided, a tie, no number itself
def test_rows_that_are_not_finite_do_not_agree(expected: list[float]) -> None:
    result = Comparison(1e-4)
    result.add("prefill", "row 0", np.array([NAN, NAN], np.float32), np.array(expected, np.float32))
    assert (result.argmax_agreement, result.max_abs_logit_error, result.rows) == (0.0, INF, 1)
    assert not result.ok


def test_a_norm_that_is_infinite_in_both_is_a_fault() -> None:
    found, both = Comparison(1e-4), trace(2, {"model.norm": 1}, INF)
    found.layers_only = True
    with np.errstate(invalid="ignore"):
        found.add_norms("prefill", [(0, 0), (0, 1)], {"model.norm": both.probes["model.norm"]}, [both])
    assert found.probes == {"model.norm": INF}
    assert "seen at model.norm" in found.first
    assert relative_error(np.ones((2, 2), np.float32), np.ones((2, 3), np.float32)) == INF


def test_overflow_in_the_targets_own_precision_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no bound, but logits must be numbers: those that are served are its."""
    rounded = Comparison(INF)
    rounded.add("decode", "sequence 1, position 3", np.array([NAN, 1.0], np.float32), np.zeros(2, np.float32))
    monkeypatch.setattr(subject, "Lockstep", lambda *args, **options: None)
    monkeypatch.setattr(subject, "compare", lambda *args, **options: rounded)
    config: Any = SimpleNamespace(vocab=2, max_positions=9, moe=None, layers=1)
    proof = Proof("ascend310p", 1, SOUND, [], [], 0.0)
    artifact: Any = None
    model: Any = None
    target = target_named("ascend310p")
    found = subject._with_half_precision(proof, artifact, target, model, config)
    assert not found.ok
    told = "in the target's own precision logits are not finite at decode, sequence 1, position 3 (float16)"
    assert found.place == told
    assert told in _failure(tmp_path, found).message
    rounded = Comparison(INF, max_abs_logit_error=0.5, agreeing=1, decided=1)
    assert subject._with_half_precision(proof, artifact, target, model, config).ok

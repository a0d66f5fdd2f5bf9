"""How far int8 is from the unquantised model: reported, and a bound only if somebody sets one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import Manifest
from msconv_runtime.errors import UsageError

from ..comparison import culprit
from ..reference import Reference, Trace
from .reference import QuantisedReference

TEXT = Path(__file__).with_name("text.txt")
WINDOW = 256  # tokens that are read as one sequence
MOST_TOKENS = 1024
FEWEST_TOKENS = 32
OWN = "evaluation.txt"  # in the source's directory: what the model is for
SHIPPED, RANDOM = "msconv's own text", "random tokens"
INT8 = "the int8 model"
SOURCE, VALUES = "the unquantised source", "the values of the source's codes"
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Drift:
    """Over all tokens of a text.  `kl`: mean of sum p log(p / q) in nats, p the unquantised model's.
    `perplexity` of the int8 model, `perplexity_before` of the other, `against`.  `text`: what was read.
    `not_finite`: which of these are no numbers, and where they cease to be; then nothing is proved."""

    kl: float
    argmax_agreement: float
    perplexity: float
    perplexity_before: float
    tokens: int
    text: str
    against: str
    not_finite: str = ""

    @property
    def words(self) -> str:
        return f"drift from {self.against}, over {self.tokens} tokens of {self.text}"

    @property
    def settings(self) -> dict[str, str | int | float]:
        """As a manifest and `--json` have it."""
        return {
            "drift_kl": self.kl,
            "drift_argmax_agreement": self.argmax_agreement,
            "drift_perplexity": self.perplexity,
            "drift_perplexity_unquantised": self.perplexity_before,
            "drift_tokens": self.tokens,
            "drift_text": self.text,
            "drift_against": self.against,
        }


def measure(
    root: Path, manifest: Manifest, reference: QuantisedReference, given: Path | None, vocab: int, positions: int
) -> Drift:
    """`root`: of the source.  `given`: a text instead of the one that ships.  Raises UsageError for one that
    cannot be read."""
    tokens, text = tokens_of(root, given, vocab)
    windows = windows_of(tokens, frozenset() if text == RANDOM else ends_of(root), max(2, min(WINDOW, positions)))
    if not windows:
        raise UsageError(f"{text}: no document in it has two tokens.", "Give a text of whole sentences.")
    after = reference.traces(windows)
    if reference.weights.is_made:
        plain = Reference(root, msgspec.structs.replace(manifest, weights=None))
        before, against = plain.traces(windows), SOURCE
    else:
        before, against = reference.traces_of_values(windows), VALUES
    p, q = (np.concatenate([t.logits for t in traces]) for traces in (before, after))
    with np.errstate(invalid="ignore", over="ignore"):  # said in words instead
        found = Drift(
            divergence(p, q),
            agreement(p, q),
            perplexity(after, windows),
            perplexity(before, windows),
            sum(map(len, windows)),
            text,
            against,
        )
    return replace(found, not_finite=_not_finite(found, before, after))


def _not_finite(drift: Drift, before: list[Trace], after: list[Trace]) -> str:
    """Where the logits of one of the two are no numbers, else which result is none; "" if all are."""
    for whose, traces in ((drift.against, before), (INT8, after)):
        token = 0
        for trace in traces:
            rows = np.flatnonzero(~np.isfinite(trace.logits).all(-1))
            if rows.size:
                norm = next((n for n, values in trace.probes.items() if not np.isfinite(values).all()), "")
                place = f"{culprit(norm)}, seen at {norm}" if norm else "lm_head"
                return (
                    f"the logits of {whose} are not finite, first of token {token + rows[0]} of {drift.text}, by "
                    f"{place}"
                )
            token += len(trace.logits)
    results = {"KL divergence": drift.kl, f"perplexity of {INT8}": drift.perplexity}
    results[f"perplexity of {drift.against}"] = drift.perplexity_before
    return next((f"the {name} is {n}: not finite" for name, n in results.items() if not np.isfinite(n)), "")


def tokens_of(root: Path, given: Path | None, vocab: int) -> tuple[list[int], str]:
    """Tokens of a text, and what it is: one that is given, that lies beside the source, or that ships.  A model
    without a tokenizer gets random ones."""
    if given is None and (root / OWN).is_file():
        given = root / OWN
    try:
        text = (given or TEXT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(
            f"{given}: cannot be read as text: {e}.", "Give a file of plain text, in UTF-8."
        ) from None
    found = _encode(root / "tokenizer.json", text)
    is_usable = len(found) >= FEWEST_TOKENS and max(found) < vocab
    if given is not None and not is_usable:
        raise UsageError(
            f"{given}: the tokenizer makes {len(found)} tokens of it; {FEWEST_TOKENS} or more are needed.",
            f"Check that {root / 'tokenizer.json'} is there and the model's, or leave --text out.",
        )
    if is_usable:
        return found[:MOST_TOKENS], given.name if given is not None else SHIPPED
    rng = np.random.default_rng(0)
    return [int(t) for t in rng.integers(0, vocab, WINDOW)], RANDOM


def ends_of(root: Path) -> frozenset[int]:
    """The tokens that end an answer, as config.json has them."""
    ends = json.loads((root / "config.json").read_bytes()).get("eos_token_id")
    return frozenset(end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int)


def windows_of(tokens: list[int], ends: frozenset[int], size: int) -> list[list[int]]:
    """Sequences of 2 to `size` tokens: of each document by itself, where an end token separates documents."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token in ends:
            documents.append([])
        else:
            documents[-1].append(token)
    windows = [document[i : i + size] for document in documents for i in range(0, len(document), size)]
    return [window for window in windows if len(window) > 1]


def _encode(path: Path, text: str) -> list[int]:
    """[] if there is no tokenizer that can be read."""
    from tokenizers import Tokenizer

    if not path.is_file():
        return []
    try:
        return list(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids)
    except Exception:  # the library raises its own for whatever is wrong with a file
        return []


def divergence(p: Logits, q: Logits) -> float:
    """Mean over rows [N, V] of logits of sum p log(p / q): never negative, which rounding would make it where
    the two are nearly the same."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return float(np.maximum(total / len(p), 0.0))  # NaN stays NaN


def agreement(p: Logits, q: Logits) -> float:
    """Share of rows [N, V] whose largest logit is the same one; a row that is not finite agrees with none."""
    finite = np.isfinite(p).all(-1) & np.isfinite(q).all(-1)
    return float(((p.argmax(-1) == q.argmax(-1)) & finite).mean())


def perplexity(traces: list[Trace], windows: list[list[int]]) -> float:
    """Of each token after the first in its window."""
    losses = [
        -float(_log_softmax(row)[token])
        for trace, window in zip(traces, windows, strict=True)
        for row, token in zip(trace.logits[:-1], window[1:], strict=True)
    ]
    return float(np.exp(np.mean(losses)))


def _log_softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = row.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())

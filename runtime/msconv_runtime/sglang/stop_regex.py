"""Stop expressions that cannot keep a server busy: what is searched for is cheap, and what is searched is short.

SGLang searches the generated text with Python's `re` after every token, in the process that runs the model, and on
every rank: a bound on time would end a request on one rank and not on another, so this one counts steps.
"""

from __future__ import annotations

import sre_constants
import sre_parse
from collections.abc import Iterable
from typing import Any, NamedTuple

SEARCHED = 256  # characters at the end of the text, and tokens
MOST_STEPS = 1 << 21  # of all expressions of a request at a token: some 20 ms
LONGEST = 256  # bytes of an expression, which SGLang refuses beyond
FAR = float(1 << 60)
REPEATS = (sre_constants.MAX_REPEAT, sre_constants.MIN_REPEAT, sre_constants.POSSESSIVE_REPEAT)


class Work(NamedTuple):
    """The most that matching at one place takes.  `ways`: different matches; `steps`: to try them all."""

    ways: float
    steps: float


ONE = Work(1, 1)


def check_stop_regex(given: Any) -> None:
    """Raises ValueError for expressions that could take too long.  Those that are none are SGLang's to refuse."""
    listed = given if isinstance(given, list) else [given]
    steps = sum(steps_of(one) for one in listed if isinstance(one, str) and len(one) <= LONGEST)
    if steps > MOST_STEPS:
        raise ValueError(
            "stop_regex could take too long to search for: repeats within repeats, repeated alternatives, or "
            "several repeats without an end.  Say how often at most, as in \\s{0,20}, or use `stop`."
        )


def steps_of(expression: str) -> float:
    """Steps of one search, at most; 0 for what is no expression."""
    try:
        parsed: Any = sre_parse.parse(expression)
    except (sre_constants.error, RecursionError, OverflowError, ValueError):
        return 0
    return min(FAR, SEARCHED * _sequence(parsed).steps)


def searched(text: str, sampling: Any) -> str:
    """The end of the text, as far as it is searched: all of it without expressions."""
    if not sampling.stop_regex_strs:
        return text
    return text[-max([SEARCHED, *map(len, sampling.stop_strs)]) :]


def searched_tokens(tokens: int, sampling: Any) -> int:
    """How many tokens at the end of the text are searched."""
    return min(tokens, max(SEARCHED, sampling.stop_str_max_len + 1)) if sampling.stop_regex_strs else tokens


def _sequence(nodes: Iterable[Any]) -> Work:
    ways, steps = 1.0, 0.0
    for kind, value in nodes:
        one = _one(kind, value)
        steps = min(FAR, steps + ways * one.steps)
        ways = min(FAR, ways * one.ways)
    return Work(ways, max(1.0, steps))


def _one(kind: Any, value: Any) -> Work:
    if kind in REPEATS:
        return _repeated(*value)
    if kind is sre_constants.BRANCH:
        return _any_of(value[1])
    if kind is sre_constants.GROUPREF_EXISTS:
        return _any_of(part for part in value[1:] if part)
    if kind is sre_constants.SUBPATTERN:
        return _sequence(value[-1])
    if kind in (sre_constants.ASSERT, sre_constants.ASSERT_NOT):
        return Work(1, SEARCHED * _sequence(value[1]).steps)  # a look behind may begin anywhere
    if kind is sre_constants.ATOMIC_GROUP:
        return _sequence(value)
    return Work(1, SEARCHED) if kind is sre_constants.GROUPREF else ONE


def _any_of(branches: Iterable[Any]) -> Work:
    found = [_sequence(branch) for branch in branches]
    return Work(min(FAR, sum(w.ways for w in found)), min(FAR, sum(w.steps for w in found)))


def _repeated(least: Any, most: Any, inner: Any) -> Work:
    once = _sequence(inner)
    times = int(min(most, SEARCHED))
    ways = steps = 0.0
    power = 1.0  # ways to have come so far
    for number in range(times + 1):
        if number >= least:
            ways = min(FAR, ways + power)
        if number < times:
            steps = min(FAR, steps + power * once.steps)
            power = min(FAR, power * once.ways)
    return Work(max(1.0, ways), max(1.0, steps))

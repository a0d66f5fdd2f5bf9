"""Stop expressions: those that people use are taken, none that is taken keeps a server busy."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msconv_runtime.sglang.requests import check_request
from msconv_runtime.sglang.stop_regex import (
    MOST_STEPS,
    SEARCHED,
    check_stop_regex,
    searched,
    searched_tokens,
    steps_of,
)

USED = [
    r"\n+User:",
    r"\d{3}",
    r"(foo|bar){1,3}x",
    r"\s{0,20}\nQ:\s{0,20}",
    r"END$",
    r"(?i)human:|assistant:",
    r"^#{1,6} .+$",
    r"[.!?]\s",
    r"(?:a|ab)(?:b|c){2}",
    r"(?<=ab)c",
    r"(?<!\w)END(?!\w)",
    r"(?:\d{1,3}\.){3}\d{1,3}",
    r"(?:ab)+$",
    r"a{0,2147483646}",
]
ENDLESS = [
    r"(a+)+$",
    r"(.+)+\n",
    r"(?:a|a)*b",
    r"(a|ab)+$",
    r".*.*.*x",
    r"(?:a?){30}a{30}",
    r"(?=(a+)+$)",
    r"(?<!(?:a|aa){1,60})b",
    r"(a*)*\1b",
    r"(((a{1000}){1000}){1000})",
    r"(?>(a+)+)b",
    r"(a)?(?(1)(a+)+|b)$",
    r"(\d+,)+",
]
HALF = SEARCHED // 2
WORST = ["a" * SEARCHED, "a" * (SEARCHED - 1) + "b", "ab" * HALF, "a\n" * HALF, "\n" * SEARCHED]
NONE = [None, "", [], "(", "[", "*", 3, [3], {"a": 1}, "a" * 10_000, "(" * 200, "a{5,2}"]
LIMIT_S = 1.0  # a search of the most steps takes some 20 ms; machines are busy


@pytest.mark.parametrize("expression", USED)
def test_what_people_use_is_taken_and_quick(expression: str) -> None:
    check_stop_regex(expression)
    started = time.monotonic()
    for text in WORST:
        re.search(expression, text)
    assert time.monotonic() - started < LIMIT_S * len(WORST)


@pytest.mark.parametrize("expression", ENDLESS)
@pytest.mark.parametrize("form", [str, lambda e: ["ok", e]], ids=["one", "listed"])
def test_what_could_take_for_ever_is_refused(expression: str, form: object) -> None:
    with pytest.raises(ValueError, match="could take too long"):
        check_stop_regex(form(expression))  # type: ignore[operator]


def test_many_that_are_fine_alone_are_counted_together() -> None:
    check_stop_regex([r"x+y"] * 2)
    with pytest.raises(ValueError, match="could take too long"):
        check_stop_regex([r"x+y"] * 32)


@pytest.mark.parametrize("given", NONE, ids=lambda given: str(given)[:10])
def test_what_is_none_is_left_to_sglang(given: object) -> None:
    check_stop_regex(given)


def test_a_request_with_one_is_refused() -> None:
    asked = SimpleNamespace(sampling_params={"stop_regex": "(a+)+$"})
    with pytest.raises(ValueError, match="stop_regex could take too long"):
        check_request(asked, [1, 2], 10)


def parts(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{1,}", "*?", "+?", "*+"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda found: f"(?:{'|'.join(found)})"),
        st.tuples(inner, repeats).map(lambda found: f"(?:{found[0]}){found[1]}"),
        inner.map(lambda found: f"(?={found})"),
        inner.map(lambda found: f"(?>{found})"),
    )


LEAVES = ["a", "b", ".", r"\s", "[ab]", "[^b]", "$", "^", "ab"]
EXPRESSIONS = st.recursive(st.sampled_from(LEAVES), parts, max_leaves=8)


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS)
def test_what_is_taken_is_quick_whatever_it_is(expression: str) -> None:
    if len(expression) > 250 or not 0 < steps_of(expression) <= MOST_STEPS:
        return
    for text in WORST:
        started = time.monotonic()
        re.search(expression, text)
        assert time.monotonic() - started < LIMIT_S, expression


def test_only_the_end_is_searched() -> None:
    regex = SimpleNamespace(stop_regex_strs=["a+"], stop_strs=[], stop_str_max_len=0)
    none = SimpleNamespace(stop_regex_strs=[], stop_strs=["x"], stop_str_max_len=1)
    both = SimpleNamespace(stop_regex_strs=["a+"], stop_strs=["x" * 1000], stop_str_max_len=900)
    text = "b" * 5000 + "a"
    assert searched(text, regex) == text[-SEARCHED:]
    assert searched(text, none) == text
    assert searched(text, both) == text[-1000:]
    assert [searched_tokens(9000, s) for s in (regex, none, both)] == [SEARCHED, 9000, 901]
    assert searched_tokens(5, regex) == 5

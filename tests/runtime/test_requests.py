"""Log probabilities of prompts that are refused before a server's process of the model sees them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from msconv_runtime.artifact import Artifact
from msconv_runtime.roles import gives_all_logits
from msconv_runtime.sglang import refusals
from msconv_runtime.sglang.requests import LOGPROBS, check_request

OLD = Path(__file__).parents[1] / "format1" / "qwen3-tp1"
SIZE = 503


def request(**fields: Any) -> Any:
    return SimpleNamespace(sampling_params={}, **{"return_logprob": True, "logprob_start_len": 0, **fields})


def refusal(tokens: list[int], missing: str = "", **fields: Any) -> str:
    """What the client is told, "" if nothing."""
    try:
        check_request(request(**fields), tokens, SIZE, missing)
    except ValueError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprob_start_len": 2},
        {"top_logprobs_num": 5, "token_ids_logprob": [1, 2]},
        {"logprob_start_len": -1},
    ],
)
def test_what_graphs_with_all_logits_answer_is_let_through(fields: dict[str, Any]) -> None:
    assert refusal([1, 2, 3], **fields) == ""


def test_without_such_graphs_only_what_asks_for_the_prompt_is_refused() -> None:
    how = "`msconv compile x --target cpu` adds them."
    assert how in refusal([1, 2, 3], how)
    assert how in refusal([1, 2, 3], how, logprob_start_len=2)
    for fields in ({"logprob_start_len": -1}, {"logprob_start_len": 3}, {"return_logprob": False}):
        assert refusal([1, 2, 3], how, **fields) == ""


def test_hidden_states_are_let_through_where_graphs_give_them() -> None:
    for asked in (True, "last"):
        assert "give no hidden states" in refusal([1, 2], return_hidden_states=asked)
        check_request(request(return_hidden_states=asked), [1, 2], SIZE, gives_hidden=True)
    assert refusal([1, 2], return_hidden_states=False) == ""


def test_a_negative_begin_is_refused() -> None:
    assert "logprob_start_len is -2" in refusal([1, 2, 3], logprob_start_len=-2)
    assert "logprob_start_len is 0.5" in refusal([1, 2, 3], logprob_start_len=0.5)


def test_places_within_a_prompt_are_refused() -> None:
    assert "token_indices_to_pool" in refusal([1, 2, 3], token_indices_to_pool=[1])
    assert "multi_item_delimiter_indices" in refusal([1, 2, 3], multi_item_delimiter_indices=[1])


def test_so_many_values_that_they_would_fill_the_memory_are_refused() -> None:
    each = 400
    fits = LOGPROBS // (each + 1)
    assert refusal([1] * fits, top_logprobs_num=each) == ""
    told = refusal([1] * (fits + 1), top_logprobs_num=each)
    assert f"{fits + 1} tokens of the prompt, {each + 1} of each" in told
    assert refusal([1] * (fits + 1), top_logprobs_num=each, logprob_start_len=1) == ""
    assert "at most" in refusal([1] * (fits + 1), token_ids_logprob=[7] * each)


def test_an_artifact_of_before_is_told_how_to_add_them(tmp_path: Path) -> None:
    root = Path(shutil.copytree(OLD, tmp_path / "old artifact"))
    assert f"`msconv compile {root} --target cpu` adds them" in refusals.missing_logprobs(str(root))


def test_both_variants_need_one(compiled: Path) -> None:
    graphs = Artifact(compiled).graphs("cpu")
    assert gives_all_logits(graphs)
    assert refusals.missing_logprobs(str(compiled)) == ""
    for name in ("verify", "verify_compiled"):
        assert not gives_all_logits([g for g in graphs if g.name != name])
    assert gives_all_logits([g for g in graphs if g.variant == ""])
    assert not gives_all_logits([])
    assert [msgspec.structs.replace(g).phase for g in graphs if g.role == "verify"] == ["decode_all", "native_all"]

"""Drafts that read the target's hidden states, on the real server: EAGLE3's and DeepSeek-V3's own layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.graph.decoder import DecoderWithDraft
from msconv.steps.compile import compile_graphs
from msconv_runtime.artifact import Artifact, Draft
from msconv_runtime.draft_kinds import LAYER_IDS
from tests.checkpoints import make_qwen3
from tests.conversions import convert
from tests.e2e import hidden_drafting, logprobs
from tests.e2e.servers import NEW_TOKENS, Server, expected, serving
from tests.eagle3_checkpoints import train_eagle3
from tests.every import one_of_many
from tests.moe_checkpoints import add_mtp, make_deepseek_v3
from tests.nextn_checkpoints import train_nextn
from tests.verify.hidden_faults import streams_exchanged

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900), one_of_many("test-servers")]

CHUNK, STEPS = 64, 3
TOPK, DRAFTS = 3, 8  # where guesses branch
LAYERS = [1, 2, 3]  # of the target, whose inputs the draft reads
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 150, 3, 9)  # around a page's and a chunk's
TOLD = "spec_correct_drafts_histogram"


@dataclass
class Case:
    """A target with what drafts for it.  `wanted`: by prompt, how often 0, 1, 2, ... drafts are accepted."""

    artifact: Path
    flags: list[str]
    model: Any
    prompts: list[list[int]]
    answers: list[list[int]]
    wanted: list[list[int]]


def load(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def artifact_of(checkpoint: Path, root: Path, draft: Draft | None = None, tp: int = 1) -> Path:
    convert(checkpoint, root, tp)
    if draft is not None:
        Artifact(root).changed(draft=draft)
    compile_graphs(root, "cpu", lambda line: None)
    return root


def talk(model: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the greedy tokens after them with those that the last drafts are compared with."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in LENGTHS]
    return prompts, [expected(model, ids, NEW_TOKENS + STEPS + 1) for ids in prompts]


@pytest.fixture(scope="module")
def of_eagle3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target's artifact, whose checkpoint lies beside it, and a draft's checkpoint."""
    root = tmp_path_factory.mktemp("eagle3")
    model = load(make_qwen3(root / "qwen3", initializer_range=0.2))
    both = zip(*talk(model), strict=True)
    ids = {"eagle_config": {LAYER_IDS: [i - 1 for i in LAYERS]}}
    train_eagle3(root / "checkpoint", model, [p + a for p, a in both], LAYERS, 300, **ids)
    return artifact_of(root / "qwen3", root / "target", Draft("eagle3", LAYERS)), root / "checkpoint"


KINDS = ["eagle3", "nextn"]
CASES = [*KINDS, "eagle3, exchanged", *(f"{k}, branches" for k in KINDS), *(f"{k}, 2 ranks" for k in KINDS)]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, _, how = request.param.partition(", ")
    root = tmp_path_factory.mktemp(request.param.replace(", ", "-").replace(" ", "-"))
    if kind == "nextn":
        return case_of_nextn(root, how)
    return case_of_eagle3(root, how, *request.getfixturevalue("of_eagle3"))


def case_of_eagle3(root: Path, how: str, target: Path, checkpoint: Path) -> Case:
    tp = 2 if how == "2 ranks" else 1
    source = target.with_name("qwen3")
    with pytest.MonkeyPatch.context() as faults:
        if how == "exchanged":
            faults.setattr(DecoderWithDraft, "construct", streams_exchanged)
        if how == "exchanged" or tp > 1:
            target = artifact_of(source, root / "target", Draft("eagle3", LAYERS), tp)
    model = load(source)
    prompts, answers = talk(model)
    run = hidden_drafting.eagle3(checkpoint, model)
    given = LAYERS[::-1] if how == "exchanged" else LAYERS
    wanted = [of(run, model, given, *pair, how) for pair in zip(prompts, answers, strict=True)]
    if how == "exchanged":
        assert wanted != [of(run, model, LAYERS, *pair) for pair in zip(prompts, answers, strict=True)]
    flags = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path"]
    flags += [str(artifact_of(checkpoint, root / "draft", tp=tp)), *shape_flags(how)]
    return Case(target, flags, model, prompts, answers, wanted)


def case_of_nextn(root: Path, how: str) -> Case:
    checkpoint = make_deepseek_v3(root / "checkpoint")
    model = load(checkpoint)
    prompts, answers = talk(model)
    train_nextn(checkpoint, model, [p + a for p, a in zip(prompts, answers, strict=True)], 150)
    artifact = artifact_of(checkpoint, root / "artifact", tp=2 if how == "2 ranks" else 1)
    run = hidden_drafting.nextn(checkpoint, artifact)
    wanted = [of(run, model, [], *pair, how) for pair in zip(prompts, answers, strict=True)]
    return Case(artifact, ["--speculative-algorithm", "NEXTN", *shape_flags(how)], model, prompts, answers, wanted)


def shape_flags(how: str) -> list[str]:
    """Whether guesses branch, and how many are verified."""
    branch = how == "branches"
    flags = ["--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", str(TOPK if branch else 1)]
    flags += ["--speculative-num-draft-tokens", str(DRAFTS if branch else STEPS + 1)]
    return [*flags, "--page-size", "1"] if branch else flags


def of(
    run: hidden_drafting.Draft, model: Any, layers: list[int], ids: list[int], answer: list[int], how: str = ""
) -> list[int]:
    states = hidden_drafting.states(model, ids + answer, layers)
    if how == "branches":
        return hidden_drafting.of_branches(run, states, ids, answer, NEW_TOKENS, STEPS, TOPK, DRAFTS)
    return hidden_drafting.histogram(run, states, ids, answer, NEW_TOKENS, STEPS)


@pytest.fixture(scope="module")
def server(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--chunked-prefill-size", str(CHUNK), "--skip-tokenizer-init", *case.flags]
    with serving(case.artifact, tmp_path_factory.mktemp("logs") / "server.log", *flags) as s:
        yield s


def test_as_many_drafts_are_accepted_as_without_a_server(server: Server, case: Case) -> None:
    found = [server.generate(ids, NEW_TOKENS) for ids in case.prompts]
    assert [answer["output_ids"] for answer in found] == [answer[:NEW_TOKENS] for answer in case.answers]
    assert sum(map(len, case.wanted)) > len(case.wanted), "no draft is accepted: the test shows nothing"
    told = [hidden_drafting.trimmed(answer["meta_info"][TOLD]) for answer in found]
    assert told == case.wanted


def test_prompts_at_once_and_after_a_cached_prefix(server: Server, case: Case) -> None:
    wanted = [answer[:NEW_TOKENS] for answer in case.answers]
    assert server.answers(case.prompts, NEW_TOKENS, at_once=True) == wanted
    again = [server.generate(ids, NEW_TOKENS) for ids in case.prompts]
    assert [answer["output_ids"] for answer in again] == wanted
    assert sum(answer["meta_info"]["cached_tokens"] for answer in again) > 0


def test_over_many_chunks_and_after_a_part_of_them(server: Server, case: Case) -> None:
    ids = np.random.default_rng(5).integers(0, case.model.config.vocab_size, 3 * CHUNK + 5).tolist()
    server.generate(ids[:90], NEW_TOKENS)
    for prompt in (ids, ids[:90], [*ids[:90], 3, 1, 4]):
        answer = server.generate(prompt, NEW_TOKENS)
        assert answer["meta_info"]["cached_tokens"] > 0
        assert answer["output_ids"] == expected(case.model, prompt)


def test_log_probabilities_of_a_prompt_beside_drafts(server: Server, case: Case) -> None:
    ids = case.prompts[7]
    answer = logprobs.ask(server, ids, 0, NEW_TOKENS)
    logprobs.check(case.model, ids, 0, answer)
    assert answer["output_ids"] == case.answers[7][:NEW_TOKENS]


@pytest.mark.parametrize("drafts", [False, True])
def test_hidden_states_are_an_answer(tmp_path: Path, drafts: bool) -> None:
    """What the head reads, of the tokens of the prompt's last chunk and of all that are answered but the last."""
    checkpoint = add_mtp(make_deepseek_v3(tmp_path / "checkpoint"))
    artifact, model = artifact_of(checkpoint, tmp_path / "artifact"), load(checkpoint)
    flags = ["--speculative-algorithm", "NEXTN"] if drafts else ["--chunked-prefill-size", str(CHUNK)]
    flags += ["--skip-tokenizer-init", "--enable-return-hidden-states"]
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 70).tolist()
    with serving(artifact, tmp_path / "server.log", *flags) as server:
        answer = server.generate(ids, NEW_TOKENS, return_hidden_states=True)
        assert server.generate(ids[:5], 3)["meta_info"].get("hidden_states") is None
    assert answer["output_ids"] == expected(model, ids)
    found = np.array([row for given in answer["meta_info"]["hidden_states"] for row in np.atleast_2d(given)])
    wanted = hidden_drafting.states(model, ids + answer["output_ids"][:-1], [])
    assert len(found) == len(wanted) - (0 if drafts else CHUNK)
    assert np.abs(found - wanted[-len(found) :]).max() < 1e-4


def test_nothing_was_compiled_for_a_request(server: Server) -> None:
    state = server.state()
    assert state["compiles_since_ready"] == state["draft"]["compiles_since_ready"] == 0

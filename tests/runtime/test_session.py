"""A Session takes what the model can take, says what is wrong with all else, and goes on working after it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv_runtime import Session
from msconv_runtime.errors import ArtifactError, UsageError
from msconv_runtime.roles import DECODE, Role
from tests.checkpoints import edit_json
from tests.commands import run_python
from tests.conftest import Checkpoints
from tests.conversions import convert

VOCAB, POSITIONS = 1003, 32  # of `short_context`
PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture(scope="module")
def artifact(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from msconv.steps.compile import compile_graphs

    root = tmp_path_factory.mktemp("session") / "artifact"
    convert(checkpoint("short_context"), root)
    compile_graphs(root, "cpu")
    return root


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return Session(artifact)


WRONG: dict[str, tuple[Callable[[Session], Any], str]] = {
    "outside the vocabulary": (
        lambda s: s.prefill([[1, 2], [3, VOCAB]]),
        f"prefill: token 1 of sequence 1 is {VOCAB}; this model has tokens 0 to {VOCAB - 1}",
    ),
    "negative": (lambda s: s.decode([7, -1]), f"decode: token 0 of sequence 1 is -1; .* 0 to {VOCAB - 1}"),
    "wider than int32": (lambda s: s.extend([[2**40 + 1], [1]]), f"extend: token 0 of sequence 0 is {2**40 + 1}"),
    "a fraction": (lambda s: s.prefill([[1.7]]), "token 0 of sequence 0 is 1.7, which is no whole number"),
    "a truth value": (lambda s: s.prefill([[True]]), "is True, which is no whole number"),
    "text": (lambda s: s.prefill(["hello"]), "is 'h', which is no whole number"),
    "not nested": (lambda s: s.prefill([1, 2]), "prefill: sequence 0 is 1, which is no list of tokens"),
    "nested too deep": (lambda s: s.decode([[1], [2]]), r"decode: token 0 of sequence 0 is \[1\]"),
    "nothing": (lambda s: s.prefill(None), "prefill: None is no list"),
    "no prompt": (lambda s: s.prefill([]), "prefill needs at least one prompt"),
    "no prompt to generate from": (lambda s: s.generate([], 3), "generate needs at least one prompt"),
    "an empty prompt": (lambda s: s.prefill([[1], []]), "prefill needs at least one token .* sequence 1 has none"),
    "an empty list of tokens": (lambda s: s.extend([[1], []]), "extend needs at least one token"),
    "no tokens": (lambda s: s.decode([]), "2 sequences are running, tokens for 0 were given"),
    "too many sequences": (lambda s: s.decode([1, 2, 3]), "2 sequences are running, tokens for 3 were given"),
    "a long prompt": (
        lambda s: s.prefill([[1] * (POSITIONS + 1)]),
        f"prefill: sequence 0 would have {POSITIONS + 1} tokens; this model takes {POSITIONS} at most",
    ),
    "a long continuation": (
        lambda s: s.extend([[1], [2] * (POSITIONS - 1)]),
        f"extend: sequence 1 would have {POSITIONS + 1} tokens",
    ),
    "a long generation": (lambda s: s.generate([[1, 2]], POSITIONS), f"would have {POSITIONS + 1} tokens"),
    "half a token": (lambda s: s.generate([[1]], 1.5), "max_new_tokens is 1.5"),  # type: ignore[arg-type]
    "fewer than none": (lambda s: s.generate([[1]], -1), "max_new_tokens is -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_model_cannot_take_is_refused_and_nothing_else_changes(session: Session, case: str) -> None:
    call, words = WRONG[case]
    session.prefill(PROMPTS)
    expected = session.decode([7, 8])
    session.prefill(PROMPTS)
    with pytest.raises(UsageError, match=words):
        call(session)
    assert session.lengths == [3, 2]
    assert np.array_equal(session.decode([7, 8]), expected)


def test_a_session_takes_a_sequence_up_to_the_last_position(session: Session) -> None:
    session.prefill([[VOCAB - 1] * (POSITIONS - 1)])
    session.decode([0])
    assert session.lengths == [POSITIONS]
    with pytest.raises(UsageError, match=f"{POSITIONS} at most"):
        session.extend([[0]])
    assert len(session.generate([[1, 2]], POSITIONS - 1)[0]) == POSITIONS - 1
    assert session.generate([[1, 2]], 0) == [[]]
    numbers: Any = [np.array([1, 2, 3], np.int64), np.array([4, 5], np.int32)]
    assert session.prefill(numbers).shape == (2, VOCAB)


@pytest.mark.parametrize("compiled", [True, False])
def test_all_tokens_logits_come_in_pieces_and_are_those_of_each_prefix(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    session = Session(artifact, compiled=compiled)
    new = [[6, 7, 8, 9, 10], [11]]
    monkeypatch.setattr(type(session.graphs), "rows_at_once", 2)
    session.prefill(PROMPTS)
    found = session.extend_all(new)
    assert session.lengths == [8, 3]
    prefixes = [p + n[: i + 1] for p, n in zip(PROMPTS, new, strict=True) for i in range(len(n))]
    np.testing.assert_allclose(found, session.prefill(prefixes), atol=1e-4)
    assert session.graphs.compiles_since_ready == 0
    with pytest.raises(UsageError, match="extend_all: token 0 of sequence 0"):
        session.extend_all([[VOCAB], *[[1]] * 5])


def test_before_a_prompt_there_is_nothing_to_go_on_with(session: Session) -> None:
    session.reset()
    for call in (lambda: session.decode([]), lambda: session.extend([]), lambda: session.decode([1])):
        with pytest.raises(UsageError, match="no sequence is running"):
            call()


def test_a_graph_that_fails_leaves_the_session_usable(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore runs a graph that failed once never again: the session binds it anew."""
    session.prefill(PROMPTS)
    expected = session.decode([7, 8])
    session.prefill(PROMPTS)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(session, "vocab_size", VOCAB + 1)
        session.extend([[1] * 20, [VOCAB]])
    assert session.lengths == [3, 2]
    assert np.array_equal(session.decode([7, 8]), expected)


def test_a_prefill_that_fails_in_the_middle_leaves_no_sequences(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = session.prefill(PROMPTS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session.graphs, "in_parts", interrupted)
        session.prefill([[1]])
    assert session.lengths == []  # the cache was written over
    assert np.array_equal(session.prefill(PROMPTS), expected)


def test_memory_that_runs_out_leaves_the_session_usable(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(artifact)
    expected = session.prefill(PROMPTS)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("msconv_runtime.session.np.zeros", no_memory)
        session.prefill([[1] * POSITIONS] * 100)
    assert np.array_equal(session.prefill(PROMPTS), expected)
    assert session.prefill([[1] * POSITIONS] * 100).shape == (100, VOCAB)


THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from msconv_runtime import Session
first, second = Session(sys.argv[1]), Session(sys.argv[1])
prompts = [[[n, n + 1, n + 2]] * (1 + n % 3) for n in range(16)]
alone = [first.generate(p, 6) for p in prompts]
with ThreadPoolExecutor(4) as pool:
    together = list(pool.map(lambda n: (first, second)[n % 2].generate(prompts[n], 6), range(16)))
assert together == alone
print("the same")
"""


def test_threads_take_turns_in_one_session_and_between_two(artifact: Path) -> None:
    done = run_python(THREADS, artifact)
    assert done.stdout.endswith("the same\n"), done.stderr[-500:]


def test_a_thread_waits_for_the_whole_of_another_ones_generation(artifact: Path) -> None:
    session = Session(artifact)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(session.lengths))
    original = session.graphs.in_parts

    def call(asked: Role, *arguments: Any) -> Any:
        if asked is DECODE and not thread.ident:
            thread.start()
        return original(asked, *arguments)

    session.graphs.in_parts = call  # type: ignore[assignment]
    session.generate([[1, 2]], 5)
    thread.join()
    assert seen == [[6]]


def test_another_way_to_load_is_refused(artifact: Path) -> None:
    with pytest.raises(UsageError, match="load is 'maped'; it may be 'mmap' or 'read'"):
        Session(artifact, load="maped")  # type: ignore[arg-type]


def test_a_configuration_that_is_not_the_artifacts_own_is_refused(artifact: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    edit_json(root / "config.json", vocab_size=10 * VOCAB)
    with pytest.raises(ArtifactError, match=r"config\.json: is not the configuration"):
        Session(root)
    (root / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read"):
        Session(root)

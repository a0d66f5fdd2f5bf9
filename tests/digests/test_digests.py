"""What is made of small checkpoints is, byte for byte, what the code of 07fe90e made of them.

If a change of bytes is meant, people must convert or compile again: say so in CHANGELOG.md, and
`python -m tests.digests.table > tests/digests/table.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msconv_runtime.targets import TARGETS
from tests.digests.models import MODELS
from tests.digests.table import ALL, QUICK, Case, Entries, differences, digests_of
from tests.every import EVERY

TABLE: dict[str, Entries] = json.loads(Path(__file__).with_name("table.json").read_text())
CASES = tuple(dict.fromkeys(ALL if EVERY else QUICK))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digests")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bytes_as_ever(case: Case, work: Path) -> None:
    problems = differences(case, TABLE[case.name], digests_of(case, work))
    assert not problems, "\n" + "\n".join(problems)


def test_each_run_takes_every_model_and_every_graph() -> None:
    assert {case.model for case in QUICK} == set(MODELS)
    made = {name.partition(" ")[2] for entries in TABLE.values() for name in entries if name.startswith("graph ")}
    targets = {target for case in QUICK for target in case.targets}
    assert {graph.partition("/")[0] for graph in made} == targets
    graphs = sum(len(TARGETS[target].graphs) + len(TARGETS[target].draft_graphs) for target in targets)
    assert len(made) == graphs + len(targets)  # and the MindSpore that made them


def test_the_table_has_every_case() -> None:
    assert {case.name for case in ALL} == TABLE.keys()
    for case in ALL:
        made = {name.split()[1].partition("/")[0] for name in TABLE[case.name] if name.startswith("graph ")}
        assert set(case.targets) <= made


def test_what_differs_is_named() -> None:
    case = Case("qwen3", 2, targets=("cpu",))
    table = {"tensor a": "1 2", "tensor b": "3 4", "graph cpu/decode": "5", "graph ascend910b/decode": "6"}
    found = {"tensor a": "1 9", "tensor c": "3 4", "graph cpu/decode": "7"}
    assert differences(case, table, found) == [
        "qwen3 tp 2 ep 1: graph cpu/decode: other bytes than in the table",
        "qwen3 tp 2 ep 1: tensor a of rank 1: other bytes than in the table",
        "qwen3 tp 2 ep 1: tensor b: is not made any more",
        "qwen3 tp 2 ep 1: tensor c: not in the table",
    ]
    assert differences(case, found, found) == []

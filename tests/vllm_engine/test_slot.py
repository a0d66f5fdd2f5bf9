"""The model class between vLLM's tensors and the graphs, without a server."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.roles import LOGITS


def slot() -> Any:
    """A model class as it is after loading, without an artifact."""
    from torch import nn

    from msconv_runtime.vllm.slot import MsconvForCausalLM

    made = MsconvForCausalLM.__new__(MsconvForCausalLM)
    nn.Module.__init__(made)
    made.compiles, made.inputs, made.vocab_size = 0, [], 5
    return made


def test_blocks_of_vllm_become_pages_of_the_graphs() -> None:
    """Two sequences in blocks of 4 tokens, 2 in each page; a row behind the last one is not theirs."""
    import torch

    from msconv_runtime.vllm.pool import Step, batch_of

    table = torch.tensor([[7, 3, 0, 0], [5, 9, 0, 0], [1, 1, 1, 1]], dtype=torch.int32)
    starts, lengths, slots = torch.tensor([0, 2, 3, 3]), torch.tensor([6, 3, 0]), torch.tensor([12, 13, 22, -1])
    step = Step(starts, lengths, table, slots, 2, 3)
    batch = batch_of(torch.arange(4), torch.tensor([4, 5, 2, 0]), step, block=4, page=2)
    assert batch.block_tables.tolist() == [[14, 15, 6], [10, 11, 18]]
    assert batch.slots.tolist() == [12, 13, 22]
    assert batch.context_lens.tolist() == [6, 3]
    assert batch.q_lens.tolist() == [2, 1]
    assert batch.positions.tolist() == [4, 5, 2]
    assert {a.dtype for a in batch.arrays} == {np.dtype(np.int32)}


def test_a_compile_after_ready_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The tests of servers look for this line."""
    counts = iter([0, 1, 1])
    logits = {LOGITS: np.zeros((1, 5), np.float32)}
    batch: Any = SimpleNamespace(q_lens=np.array([1]))
    made = slot()
    with caplog.at_level(logging.WARNING, logger="msconv_runtime"):
        for said in (0, 1, 1):
            graphs: Any = SimpleNamespace(in_parts=lambda *_: logits, compiles_since_ready=next(counts))
            made._run(graphs, batch)
            assert sum("compiles since ready: 1" in r.getMessage() for r in caplog.records) == said


def test_logits_are_those_of_the_tokens_that_are_asked_for() -> None:
    import torch

    made = slot()
    made.logits = torch.arange(15.0).reshape(3, 5)
    assert made.compute_logits(torch.tensor([[2], [0]])).tolist() == [[10, 11, 12, 13, 14], [0, 1, 2, 3, 4]]
    with pytest.raises(EnvironmentProblem, match="not the last of its sequence"):
        made.compute_logits(torch.tensor([[1], [-1]]))
    made.logits = torch.zeros(0, 5)
    assert made.compute_logits(torch.tensor([[-1]])).shape == (1, 5)

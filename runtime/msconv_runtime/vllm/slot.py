"""vLLM's model class for an artifact: a batch goes from vLLM's tensors to the graphs, logits come back.

A hidden state is the number of its token's row among the logits of the last batch: vLLM picks those that it wants
logits of, and `compute_logits` looks them up.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context

from ..artifact import Artifact
from ..collectives import create_groups, group_names
from ..errors import EnvironmentProblem
from ..graphs import Graphs, Place
from ..paging import Batch
from ..roles import DECODE, LOGITS, PREFILL, of_model
from ..serving import loading
from ..serving.settings import Settings
from ..targets import Target, target_named
from ..vector_math import choose_code
from .checks import open_served
from .pool import CacheLayer, Step, batch_of

NONE = -1  # of a token that has no logits
logger = logging.getLogger(__name__)


class MsconvForCausalLM(nn.Module):
    """Registered by the plug-in; `load` is called by its loader, once."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        choose_code()  # log probabilities are torch's
        settings = Settings.read()
        self.artifact, target = open_served(vllm_config), target_named(settings.target)
        self.block = int(vllm_config.cache_config.block_size)
        self.vocab_size = int(vllm_config.model_config.get_vocab_size())
        graphs = self.artifact.graphs(target.name)
        caches = (of_model(graphs) or graphs)[0].caches
        self.layers = nn.ModuleList(CacheLayer(c, vllm_config, f"caches.{i}") for i, c in enumerate(caches))
        rank = _join(self.artifact, target)
        self.place = Place(rank, ranks_here=settings.ranks_here)
        self.graphs: Graphs | None = None
        self.inputs: list[Any] = []
        self.logits = torch.zeros(0, self.vocab_size)
        self.compiles = 0

    def load(self) -> None:
        """Load this rank and warm its graphs up: the server is not ready before.  Raises as `loading.finish`."""
        if self.graphs is not None:
            raise EnvironmentProblem(
                f"{self.artifact.root}: is loaded, and takes no other weights.", "Start another server."
            )
        self.graphs = loading.finish(self.artifact, self.place)
        if self.block % self.graphs.page:
            raise EnvironmentProblem(
                f"--block-size {self.block}: the graphs' pages have {self.graphs.page} tokens.",
                f"Give a multiple of {self.graphs.page}.",
            )

    def load_weights(self, weights: Any) -> set[str]:
        raise EnvironmentProblem("An artifact takes no other weights.", "Convert again and start another server.")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the graphs take tokens")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Run a batch.  Gives the numbers of rows of logits [T, 1], int64."""
        rows = torch.full((len(input_ids), 1), NONE)
        step = _step()
        if step is None:  # vLLM measures memory: no cache is there yet
            return rows
        assert self.graphs is not None
        if not self.inputs:
            self.inputs = [layer.as_input(self.graphs.page) for layer in self.layers]
            logger.info("msconv: KV pool %s shared with the graphs", self.inputs[0].shape)
            if seconds := self.graphs.keep_caches(self.inputs):
                logger.info("msconv: decoding of one request bound for this pool in %.2f s", seconds)
        batch = batch_of(input_ids, positions, step, self.block, self.graphs.page)
        self.logits = torch.from_numpy(self._run(self.graphs, batch))
        rows[torch.from_numpy(batch.q_lens).long().cumsum(0) - 1, 0] = torch.arange(len(batch.q_lens))
        return rows

    def _run(self, graphs: Graphs, batch: Batch) -> Any:
        """Logits of each sequence's last token, [B, V] float32."""
        role = DECODE if (batch.q_lens == 1).all() else PREFILL
        logits = graphs.in_parts(role, batch, self.inputs)[LOGITS]
        if graphs.compiles_since_ready > self.compiles:
            self.compiles = graphs.compiles_since_ready
            logger.warning("msconv: compiles since ready: %d: a request waited for it", self.compiles)
        return logits

    def compute_logits(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """Logits [n, V] float32 of tokens by the numbers of their rows [n, 1]."""
        rows = hidden_states[:, 0]
        if not len(self.logits):  # vLLM tries its sampler out
            return torch.zeros(len(rows), self.vocab_size)
        if len(rows) and int(rows.min()) < 0:
            raise EnvironmentProblem(
                "vLLM asks for logits of a token that is not the last of its sequence.",
                "Ask for no log probabilities of prompts, and draft nothing.",
            )
        return self.logits[rows]


def _step() -> Step | None:
    """Of the batch that runs: the same for all layers."""
    found = get_forward_context().attn_metadata
    step = next(iter(found.values())) if isinstance(found, dict) and found else None
    assert step is None or isinstance(step, Step)
    return step


def _join(artifact: Artifact, target: Target) -> int:
    """This process's rank, after the groups that the graphs name are there.  All ranks call this."""
    group, names = get_tp_group(), group_names(artifact, target)
    if names and group.world_size > 1:
        host = Settings.read().meeting_host
        create_groups(names, group.ranks, group.rank_in_group, host, group.broadcast_object)
    return int(group.rank_in_group)

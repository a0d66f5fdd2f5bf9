"""The model class under upstream's name: an artifact gets our graphs, every other model upstream's class.

Upstream's class starts MindSpore and loads; a batch goes from SGLang's tensors straight to the graphs.  CPU and
NPU take the same way through this file; on an NPU it has not run yet.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import sglang.srt.models.mindspore as upstream
import torch
from mindspore import Tensor, nn
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.runtime_context import get_model, get_parallel, get_schedule

from ..artifact import Artifact, GraphInput, is_artifact
from ..artifact.served import refuse_wrong_files
from ..errors import ArtifactError, EnvironmentProblem
from ..graphs import Graphs, Place
from ..paging import RAGGED_TOKENS, Batch, Ints
from ..serving import loading
from ..serving.settings import Settings
from ..targets import Target, target_named
from . import drafts, pool, prompt_logprobs
from .flags import pool_problems
from .groups import find_groups
from .upstream_names import NoMask, complete

logger = logging.getLogger(__name__)


class MindSporeForCausalLM(upstream.MindSporeForCausalLM):
    """Registered in place of upstream's class of this name."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        self.is_artifact = _artifact_of(config) is not None
        if self.is_artifact:
            if not upstream._is_npu:
                complete(upstream)
            upstream.LowerTriangularMask = NoMask
        super().__init__(config=config, quant_config=quant_config, prefix=prefix)

    def get_arch(self, config: Any) -> Any:
        return ArtifactModel if _artifact_of(config) is not None else super().get_arch(config)

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        if not self.is_artifact:
            return super().forward(input_ids, positions, forward_batch)
        return self.model.run(input_ids, positions, forward_batch)


def _artifact_of(config: Any) -> Path | None:
    path = getattr(config, "_name_or_path", None)
    return Path(path) if path is not None and is_artifact(path) else None


class ArtifactModel(nn.Cell):
    """What upstream calls the architecture: loads the artifact's rank, runs its graphs."""

    capture_aux_hidden_states = False

    def __init__(self, config: Any, quant_config: Any = None) -> None:
        super().__init__()
        import mindspore

        root = _artifact_of(config)
        assert root is not None
        self.artifact = Artifact(root)
        refuse_wrong_files(self.artifact)
        self.num_layers = config.num_hidden_layers
        settings = Settings.read()
        target = target_named(settings.target)
        cache = self.artifact.graphs(target.name)[0].caches[-1]
        config.param_dtype = getattr(mindspore, target.dtype)
        rank, page = check_parallel(self.artifact), get_schedule().page_size
        if target.paging.slots is None:
            check_pool(root, target, cache, page, get_model().kv_cache_dtype)
        groups = find_groups(self.artifact, target, get_parallel().tp_group)
        self.place = Place(rank, page, groups, settings.ranks_here)
        self.caches: list[Any] = []
        self.graphs: Graphs | None = None
        self.compiles = 0

    def load_weights(self, weights: Any) -> None:
        """Load this rank, unless it is being loaded beside.  SGLang's own iterator is never advanced."""
        if self.graphs is not None:
            raise EnvironmentProblem(
                f"{self.artifact.root}: is loaded, and takes no other weights.", "Start another server."
            )
        if not loading.has_begun(self.artifact.root):
            self.graphs = loading.finish(self.artifact, self.place)

    def run(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        """SGLang's LogitsProcessorOutput: logits [B, V] float32 of each sequence's last token, and what is asked
        for of the prompts' log probabilities.  Of drafts that are verified, logits of every token [T, V]."""
        if self.graphs is None:
            self.graphs = loading.finish(self.artifact, self.place)
        if not self.caches:
            self.caches = self._map_pool(self.graphs)
        batch = batch_of(input_ids, positions, forward_batch, self.graphs.page)
        with pool.at_work():
            output = self._output(self.graphs, batch, forward_batch, input_ids.device)
        if self.graphs.compiles_since_ready > self.compiles:
            self.compiles = self.graphs.compiles_since_ready
            logger.warning("msconv: compiles since ready: %d: a request waited for it", self.compiles)
        return output

    def _output(self, graphs: Graphs, batch: Batch, forward_batch: Any, device: Any) -> Any:
        mode = forward_batch.forward_mode
        if _has_drafts(mode):
            logits = graphs.every_token(batch, self.caches, RAGGED_TOKENS)
        elif mode.is_extend() and (asked := prompt_logprobs.asked(forward_batch)):
            return prompt_logprobs.run(graphs, batch, asked, self.caches, device)
        else:
            logits = (graphs.prefill if mode.is_extend() else graphs.decode)(batch, self.caches)
        return LogitsProcessorOutput(next_token_logits=torch.from_numpy(logits).to(device), hidden_states=None)

    def _map_pool(self, graphs: Graphs) -> list[Any]:
        """SGLang's KV pool as graph inputs: the same memory as [pages, page, K, D].  Two a layer, k0 v0 k1 v1 ...,
        or one where both come from the same latent."""
        servers = get_token_to_kv_pool()
        getters = [servers.get_key_buffer, servers.get_value_buffer][: len(graphs.caches) // self.num_layers]
        wanted = graphs.caches[0].shape[2:]
        caches = []
        for layer in range(self.num_layers):
            for buffer in (get(layer) for get in getters):
                if not buffer.is_contiguous():
                    raise EnvironmentProblem("SGLang's KV pool is not contiguous: it cannot be shared.")
                if buffer.shape[-2:] != tuple(wanted):
                    raise ArtifactError(
                        f"{self.artifact.root}: SGLang's KV pool has heads and dimension "
                        f"{list(buffer.shape[-2:])}, the graphs want {wanted}."
                    )
                paged = buffer.view(-1, graphs.page, *buffer.shape[-2:])
                on_cpu = paged.device.type == "cpu"  # where DLPack takes 0.5 ms a megabyte, for the same memory
                caches.append(Tensor.from_numpy(paged.numpy()) if on_cpu else upstream.tensor_torch2ms(paged))
        logger.info("msconv: KV pool %s shared with the graphs", caches[0].shape)
        return caches


def batch_of(input_ids: Any, positions: Any, forward_batch: Any, page: int) -> Batch:
    """SGLang's batch as graph inputs, without a MindSpore operation: those cost more than a small graph."""
    ids, places, slots = _ints(input_ids), _ints(positions), _ints(forward_batch.out_cache_loc)
    table, mode = get_req_to_token_pool().req_to_token, forward_batch.forward_mode
    if _has_drafts(mode):
        return drafts.batch_of(ids, places, slots, forward_batch, table, page)
    if mode.is_extend():
        context_lens, q_lens = _ints(forward_batch.seq_lens), _ints(forward_batch.extend_seq_lens)
    else:  # a draft model's steps go on with positions, while seq_lens stay
        context_lens, q_lens = places + 1, np.ones(len(places), np.int32)
    rows = table[forward_batch.req_pool_indices, : int(context_lens.max())]
    return Batch(
        input_ids=ids,
        positions=places,
        slots=slots,
        block_tables=_ints(rows[:, ::page]) // page,
        context_lens=context_lens,
        q_lens=q_lens,
    )


def _has_drafts(mode: Any) -> bool:
    """Whether a batch has several new tokens of each sequence whose logits are all asked for."""
    return bool(mode.is_target_verify() or mode.is_draft_extend_v2())


def _ints(tensor: Any) -> Ints:
    return np.array(tensor.cpu().numpy(), np.int32)  # a copy: SGLang goes on with its tensor


def check_pool(root: Path, target: Target, cache: GraphInput, page: int, kv_dtype: str | None) -> None:
    """Raises EnvironmentProblem, before a byte of the weights is read, if the KV pool that SGLang will make for an
    NPU cannot be the graphs' input `cache`."""
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    problems = pool_problems(target, cache, page, kv_dtype or "auto")
    if not hasattr(KVCacheConfigurator, "_build_ascend_mla_kv_pool"):
        problems.append("this SGLang makes its pools elsewhere: 0.5.23 is what msconv was tried with")
    if problems:
        raise EnvironmentProblem(
            f"{root}: SGLang's KV pool cannot be shared with the graphs: {'; '.join(problems)}.",
            "`msconv serve --device npu` gives the right flags.",
        )


def check_parallel(artifact: Artifact) -> int:
    """This process's rank.  Raises EnvironmentProblem if the server's layout is not the artifact's."""
    server, wanted = get_parallel(), artifact.manifest.parallel
    layout = {
        "--tp-size": (server.tp_size, wanted.tp),
        "--ep-size": (server.moe_ep_size, wanted.ep),
        "--pp-size": (server.pp_size, 1),
        "--moe-dp-size": (server.moe_dp_size, 1),
        "data-parallel attention": (server.attn_dp_size, 1),
        "context-parallel attention": (server.attn_cp_size, 1),
    }
    wrong = [f"{name} {found}, not {right}" for name, (found, right) in layout.items() if found != right]
    if wrong:
        raise EnvironmentProblem(
            f"{artifact.root}: was converted for tp {wanted.tp}, ep {wanted.ep}; the server runs "
            f"{'; '.join(wrong)}.",
            "`msconv serve` gives the right flags; `msconv reshard` makes an artifact for another layout.",
        )
    return int(server.tp_rank)


EntryClass = [MindSporeForCausalLM]

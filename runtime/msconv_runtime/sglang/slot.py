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
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.runtime_context import get_device, get_model, get_parallel, get_schedule, get_spec

from ..artifact import Artifact, GraphInput, is_artifact
from ..artifact.served import refuse_wrong_files
from ..errors import ArtifactError, EnvironmentProblem
from ..graphs import Graphs, Place
from ..kv_pool import widest_cache
from ..paging import Batch, Ints
from ..roles import DECODE, LOGITS, PREFILL, VERIFY
from ..serving import loading
from ..serving.settings import Settings
from ..targets import Target, target_named
from ..vector_math import choose_code
from . import drafts, hidden, pool, prompt_logprobs
from .flags import pool_problems
from .groups import find_groups
from .hidden import check_captured, find_model, target_tokens
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

    @property
    def hot_token_id(self) -> Any:
        return self.model.target_tokens if self.is_artifact else super().hot_token_id

    def get_embed_and_head(self) -> Any:
        """Nothing: the graphs of a draft have found what they share with its target when they were loaded.  SGLang
        asks the device of it."""
        if not self.is_artifact:
            return super().get_embed_and_head()
        return torch.empty(0, device=get_device().device), None

    def set_embed_and_head(self, embed: Any, head: Any) -> None:
        if not self.is_artifact:
            super().set_embed_and_head(embed, head)

    def set_embed(self, embed: Any) -> None:
        if not self.is_artifact:
            super().set_embed(embed)

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        if self.is_artifact:
            check_captured(self.model.artifact, layer_ids)
        else:
            super().set_eagle3_layers_to_capture(layer_ids)


def _artifact_of(config: Any) -> Path | None:
    path = getattr(config, "_name_or_path", None)
    return Path(path) if path is not None and is_artifact(path) else None


class ArtifactModel(nn.Cell):
    """What upstream calls the architecture: loads the artifact's rank, runs its graphs."""

    capture_aux_hidden_states = False

    def __init__(self, config: Any, quant_config: Any = None) -> None:
        super().__init__()
        import mindspore

        choose_code()  # log probabilities are torch's
        root = _artifact_of(config)
        assert root is not None
        self.artifact = Artifact(root)
        refuse_wrong_files(self.artifact)
        self.drafts_for = find_model(self.artifact, config.architectures[0])
        self.target_tokens = target_tokens(self.artifact)
        settings = Settings.read()
        target = target_named(settings.target)
        cache = widest_cache(self.artifact, target)
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
        if self.drafts_for is not None or not loading.has_begun(self.artifact.root):
            self.graphs = self._finish()

    def _finish(self) -> Graphs:
        model = loading.finish(self.drafts_for, self.place) if self.drafts_for else None
        return loading.finish(self.artifact, self.place, model)

    def run(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        """SGLang's LogitsProcessorOutput: logits [B, V] float32 of each sequence's last token, and what is asked
        for of the prompts' log probabilities.  Of drafts that are verified, logits of every token [T, V]."""
        if self.graphs is None:
            self.graphs = self._finish()
        if not self.caches:
            self.caches = self._map_pool(self.graphs)
            if seconds := self.graphs.keep_caches(self.caches):
                logger.info("msconv: decoding of one request bound for this pool in %.2f s", seconds)
        batch = batch_of(input_ids, positions, forward_batch, self.graphs.page)
        with pool.at_work():
            run = hidden.of_draft if self.graphs.is_draft else self._output
            output = run(self.graphs, batch, forward_batch, self.caches, input_ids.device)
        if self.graphs.compiles_since_ready > self.compiles:
            self.compiles = self.graphs.compiles_since_ready
            logger.warning("msconv: compiles since ready: %d: a request waited for it", self.compiles)
        return output

    def _output(self, graphs: Graphs, batch: Batch, forward_batch: Any, caches: list[Any], device: Any) -> Any:
        mode = forward_batch.forward_mode
        role = VERIFY if _has_drafts(mode) else PREFILL if mode.is_extend() else DECODE
        asked = prompt_logprobs.asked(forward_batch) if role is PREFILL else None
        captured = forward_batch.capture_hidden_mode
        is_captured = captured.need_capture()
        if asked is None or is_captured:
            found = graphs.in_parts(role, batch, caches)
            kept = hidden.of_last(found, batch) if captured.is_last() and role is not VERIFY else found
            output = hidden.as_output(kept if is_captured else {LOGITS: found[LOGITS]}, device)
        if asked is not None:  # what drafts read is not made piece by piece: the prompt runs twice
            states = output.hidden_states if is_captured else None
            output = prompt_logprobs.run(graphs, batch, asked, caches, device)
            output.hidden_states = states
        return output

    def _map_pool(self, graphs: Graphs) -> list[Any]:
        """SGLang's KV pool as graph inputs: the same memory as [pages, page, K, D].  Two a layer, k0 v0 k1 v1 ...,
        or one where both come from the same latent."""
        servers = get_token_to_kv_pool()
        kinds = {cache.name.partition(".")[0] for cache in graphs.caches}
        getters = [servers.get_key_buffer, servers.get_value_buffer][: len(kinds)]
        wanted = graphs.caches[0].shape[2:]
        caches = []
        for layer in range(len(graphs.caches) // len(kinds)):
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
        if len(places) > len(forward_batch.req_pool_indices):
            return _branches(ids, places, slots, forward_batch, table)
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


def _branches(ids: Ints, places: Ints, slots: Ints, forward_batch: Any, table: Any) -> Batch:
    """A step of a draft model whose guesses branch."""
    before, steps = _ints(forward_batch.seq_lens), get_spec().speculative_num_steps
    longest = int(before.max()) + len(places) // len(before) * steps
    rows = _ints(table[forward_batch.req_pool_indices, :longest])
    return drafts.branches(ids, places, slots, rows, before, steps)


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

"""The model class under upstream's name: an artifact gets our graphs, every other model upstream's class.

Upstream's class starts MindSpore and loads; a batch goes from SGLang's tensors straight to the graphs.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import sglang.srt.models.mindspore as upstream
import torch
from mindspore import nn
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.runtime_context import get_parallel

from ..artifact import Manifest, is_artifact, read_manifest
from ..errors import ArtifactError, EnvironmentProblem
from ..graphs import Graphs
from . import cpu
from .collectives import create_groups
from .launch import CHECK_DIGESTS, STRICT_AOT

logger = logging.getLogger(__name__)


class MindSporeForCausalLM(upstream.MindSporeForCausalLM):
    """Registered in place of upstream's class of this name."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        self.is_artifact = _artifact_of(config) is not None
        if self.is_artifact:
            if upstream._is_npu:
                raise EnvironmentProblem(
                    f"{config._name_or_path}: has graphs for the CPU only; this machine serves on an NPU."
                )
            cpu.complete(upstream)
        super().__init__(config=config, quant_config=quant_config, prefix=prefix)

    def get_arch(self, config: Any) -> Any:
        return ArtifactModel if _artifact_of(config) is not None else super().get_arch(config)

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        if not self.is_artifact:
            return super().forward(input_ids, positions, forward_batch)
        logits = self.model.run(input_ids, positions, forward_batch)
        return LogitsProcessorOutput(next_token_logits=logits, hidden_states=None)


def _artifact_of(config: Any) -> Path | None:
    path = getattr(config, "_name_or_path", None)
    return Path(path) if path is not None and is_artifact(path) else None


class ArtifactModel(nn.Cell):
    """What upstream calls the architecture: loads the artifact's rank, runs its two graphs."""

    capture_aux_hidden_states = False

    def __init__(self, config: Any, quant_config: Any = None) -> None:
        super().__init__()
        import mindspore

        root = _artifact_of(config)
        assert root is not None
        self.root = root
        self.manifest = read_manifest(root)
        self.num_layers = config.num_hidden_layers
        config.param_dtype = mindspore.float32
        self.rank = check_parallel(self.manifest, root)
        create_groups(root, self.manifest, "cpu", get_parallel().tp_group)
        self.caches: list[Any] = []

    def load_weights(self, weights: Any) -> None:
        """Load this rank and warm up both graphs.  SGLang's own iterator is never advanced."""
        started = time.monotonic()
        check = os.environ.get(CHECK_DIGESTS, "") == "1"
        self.graphs = Graphs(self.root, self.manifest, "cpu", self.rank, check=check)
        loaded = time.monotonic()
        self.graphs.warm_up(strict=os.environ.get(STRICT_AOT, "1") != "0")
        self.compiles = 0
        logger.info(
            "msconv: rank %d of %s: %d tensors bound in %.2f s, prefill and decode warmed up in %.2f s; compiles "
            "since ready are counted from here",
            self.rank,
            self.root,
            len(self.graphs.tensors),
            loaded - started,
            time.monotonic() - loaded,
        )

    def run(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        """Logits [B, V] float32 of each sequence's last token, a torch tensor."""
        if not self.caches:
            self.caches = self._map_pool()
        batch = cpu.batch_of(input_ids, positions, forward_batch)
        if forward_batch.forward_mode.is_extend():
            logits = self.graphs.prefill(batch, self.caches)
        else:
            logits = self.graphs.decode(batch, self.caches).asnumpy()
        if self.graphs.compiles_since_ready > self.compiles:
            self.compiles = self.graphs.compiles_since_ready
            logger.warning("msconv: compiles since ready: %d: a request waited for it", self.compiles)
        return torch.from_numpy(logits)

    def _map_pool(self) -> list[Any]:
        """SGLang's KV pool as graph inputs: the same memory as [pages, page, K, D].  Two a layer, k0 v0 k1 v1 ...,
        or one where both come from the same latent."""
        pool = get_token_to_kv_pool()
        getters = [pool.get_key_buffer, pool.get_value_buffer][: self.graphs.num_caches // self.num_layers]
        caches = []
        for layer in range(self.num_layers):
            for buffer in (get(layer) for get in getters):
                if not buffer.is_contiguous():
                    raise EnvironmentProblem("SGLang's KV pool is not contiguous: it cannot be shared.")
                paged = buffer if buffer.ndim == 4 else buffer.view(-1, pool.page_size, *buffer.shape[1:])
                caches.append(upstream.tensor_torch2ms(paged))
        found, expected = list(caches[0].shape[2:]), self.graphs.cache_shape[2:]
        if found != expected:
            raise ArtifactError(
                f"{self.root}: SGLang's KV pool has heads and dimension {found}, the graphs want {expected}."
            )
        logger.info("msconv: KV pool %s shared with the graphs", caches[0].shape)
        return caches


def check_parallel(manifest: Manifest, root: Path) -> int:
    """This process's rank.  Raises EnvironmentProblem if the server's layout is not the artifact's."""
    server, wanted = get_parallel(), manifest.parallel
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
            f"{root}: was converted for tp {wanted.tp}, ep {wanted.ep}; the server runs {'; '.join(wrong)}.",
            "`msconv serve` gives the right flags; `msconv reshard` makes an artifact for another layout.",
        )
    return int(server.tp_rank)


EntryClass = [MindSporeForCausalLM]

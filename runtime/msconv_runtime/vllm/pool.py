"""The KV pool: for each cache of the graphs a layer of vLLM's, whose memory is the cache.

vLLM allocates [blocks, heads, tokens, width] a layer, in the order [blocks, tokens, heads, width]: that is the
graphs' [pages, page, heads, width].  A cache of keys, of values, or of what is common to both is one layer each:
vLLM's block has the bytes of its own tokens and no others: what vLLM does to a block, it does to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from ..artifact import GraphInput
from ..errors import EnvironmentProblem
from ..paging import Batch, Ints


@dataclass
class Step:
    """What a graph needs of vLLM's batch: B sequences, T tokens."""

    query_start_loc: torch.Tensor  # [B + 1]
    seq_lens: torch.Tensor  # [B], new tokens included
    block_table: torch.Tensor  # [B, blocks of the longest that may be]
    slot_mapping: torch.Tensor  # [T]
    num_reqs: int
    num_actual_tokens: int


class StepBuilder(AttentionMetadataBuilder[Step]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        batch = common_attn_metadata
        return Step(
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table_tensor,
            batch.slot_mapping,
            batch.num_reqs,
            batch.num_actual_tokens,
        )


class NoAttention(AttentionImpl[Step]):
    """The graphs attend by themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("attention is a part of the graphs")


class GraphBackend(AttentionBackend):
    """What vLLM asks about memory: any block, any width, tokens before heads."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "MSCONV"

    @staticmethod
    def get_impl_cls() -> type[NoAttention]:
        return NoAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)


class CacheLayer(nn.Module, AttentionLayerBase):
    """One cache of the graphs, as a layer whose memory vLLM allocates and binds."""

    def __init__(self, cache: GraphInput, vllm_config: Any, name: str) -> None:
        super().__init__()
        self.cache, self.name = cache, name
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return GraphBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        heads, width = self.cache.shape[2:]
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=heads,
            head_size=width,
            head_size_v=0,
            dtype=getattr(torch, self.cache.dtype),
        )

    def as_input(self, page: int) -> Any:
        """vLLM's memory as the graphs' input, [pages, page, heads, width], without a copy."""
        from mindspore import Tensor

        memory = self.kv_cache.permute(0, 2, 1, 3)
        if not memory.is_contiguous():
            raise EnvironmentProblem(
                f"vLLM's KV pool of {self.name} has strides {self.kv_cache.stride()}: it cannot be shared.",
                "Unset VLLM_KV_CACHE_LAYOUT.",
            )
        paged = memory.reshape(-1, page, *memory.shape[2:])
        assert paged.data_ptr() == self.kv_cache.data_ptr()
        return Tensor.from_numpy(paged.numpy())


def batch_of(input_ids: torch.Tensor, positions: torch.Tensor, step: Step, block: int, page: int) -> Batch:
    """vLLM's batch as graph inputs.  `block`: tokens of vLLM's, `page`: of the graphs', of which it has some."""
    sequences, tokens = step.num_reqs, step.num_actual_tokens
    context = _ints(step.seq_lens[:sequences])
    longest = int(context.max())
    blocks = _ints(step.block_table[:sequences, : -(-longest // block)])
    pages = blocks[:, :, None] * (block // page) + np.arange(block // page, dtype=np.int32)
    return Batch(
        input_ids=_ints(input_ids[:tokens]),
        positions=_ints(positions[:tokens]),
        slots=_ints(step.slot_mapping[:tokens]),
        block_tables=pages.reshape(sequences, -1)[:, : -(-longest // page)],
        context_lens=context,
        q_lens=np.diff(_ints(step.query_start_loc[: sequences + 1])),
    )


def _ints(values: torch.Tensor) -> Ints:
    return np.array(values.numpy(), np.int32)  # a copy: vLLM goes on with its tensor

"""What only a CPU needs: names upstream imports on an NPU, no mask (CPU graphs make their own), the batch."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from ..paging import Batch, Ints


class NoMask:
    """In place of upstream's LowerTriangularMask, which would allocate 512 MB for what no CPU graph reads."""

    def __init__(self, dtype: Any, max_model_len: int) -> None:
        from mindspore import mint

        self.mask = mint.zeros((1, 1), dtype=dtype)

    def gen_attention_mask(self, *args: Any) -> Any:
        return self.mask


def complete(upstream: Any) -> None:
    """Give upstream's module the names it imports only on an NPU.  Idempotent."""
    if hasattr(upstream, "ms"):
        return
    import mindspore

    upstream.ms, upstream.np, upstream.Tensor = mindspore, np, mindspore.Tensor
    upstream.mint, upstream.mutable = mindspore.mint, mindspore.mutable
    upstream.torch_npu = types.SimpleNamespace(npu=types.SimpleNamespace(synchronize=lambda: None))
    upstream.LowerTriangularMask = NoMask


def batch_of(input_ids: Any, positions: Any, forward_batch: Any) -> Batch:
    """SGLang's batch as graph inputs, without a MindSpore operation: those cost more than a small graph."""
    from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool

    page = get_token_to_kv_pool().page_size
    context_lens = _ints(forward_batch.seq_lens)
    rows = get_req_to_token_pool().req_to_token[forward_batch.req_pool_indices, : int(context_lens.max())]
    if forward_batch.forward_mode.is_extend():
        q_lens = _ints(forward_batch.extend_seq_lens)
    else:
        q_lens = np.ones(len(context_lens), np.int32)
    return Batch(
        input_ids=_ints(input_ids),
        positions=_ints(positions),
        slots=_ints(forward_batch.out_cache_loc),
        block_tables=_ints(rows[:, ::page]) // page,
        context_lens=context_lens,
        q_lens=q_lens,
    )


def _ints(tensor: Any) -> Ints:
    return np.array(tensor.numpy(), np.int32)  # a copy: SGLang goes on with its tensor

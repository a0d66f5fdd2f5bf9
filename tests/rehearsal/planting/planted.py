"""Faults planted in a server's processes, through SGLang's plug-ins: as a wrong runtime would have them.

PLANTED_AT_LOAD names faults that are there from the start; the file PLANTED_NOW holds the one that is on, and may
be changed while the server runs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

NOW = Path(os.environ.get("PLANTED_NOW", "/dev/null"))


def fault_now() -> str:
    return NOW.read_text().strip() if NOW.is_file() else ""


def activate() -> None:
    from msconv_runtime import graphs, paging

    call, mask = graphs.Graphs._call, paging.attention_mask

    def planted_call(self: Any, graph: Any, batch: Any, caches: Any, hidden: Any) -> Any:
        fault = CALLS.get(fault_now()) if getattr(caches[0], "torch", None) is not None else None
        if fault is None:
            return call(self, graph, batch, caches, hidden)
        return fault(self, lambda *what: call(*what, hidden), graph, batch, list(caches))

    def planted_mask(is_prefill: bool, batch: Any, hides: float) -> Any:
        right = mask(is_prefill, batch, hides)
        if fault_now() == "mask of zeros" and right.shape != (128, 128):
            return np.zeros_like(right)
        if fault_now() == "mask of one" and right.shape == (128, 128):
            return np.triu(np.ones_like(right), 2)
        return right

    graphs.Graphs._call, graphs.attention_mask = planted_call, planted_mask
    for name in filter(None, os.environ.get("PLANTED_AT_LOAD", "").split(",")):
        AT_LOAD[name]()


def edit(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda self, call, graph, batch, caches: call(self, graph, change(batch), caches)


def exchange(a: int, b: int) -> Callable[..., Any]:
    def planted(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
        caches[a], caches[b] = caches[b], caches[a]
        return call(self, graph, batch, caches)

    return planted


def contexts_of_cached(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
    """In decode: in prefill the graph itself refuses it."""
    wrong = replace(batch, context_lens=batch.context_lens - (graph.role == "decode"))
    return call(self, graph, wrong, caches)


def pages_of_16(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
    """As if SGLang's page had never reached the graphs."""
    parts = caches[0].shape[1] // 16
    tables = (batch.block_tables[:, :, None] * parts + np.arange(parts)).reshape(len(batch.q_lens), -1)
    small = [type(c)(c.torch.view(-1, 16, *c.torch.shape[2:])) for c in caches]
    return call(self, graph, replace(batch, block_tables=tables.astype(np.int32)), small)


def always_prefill(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
    return call(self, self.entries["prefill"] if int(batch.q_lens.max()) > 1 else graph, batch, caches)


def always_decode(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
    return call(self, self.entries["decode"], batch, caches)


def copied_pool(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
    """The same copies at each call: tokens and logits are right."""
    if not COPIES:
        COPIES[:] = [type(c)(c.torch.clone()) for c in caches]
    return call(self, graph, batch, COPIES)


COPIES: list[Any] = []


def on_rank_1(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
    from sglang.srt.runtime_context import get_parallel

    wrong = replace(batch, input_ids=batch.input_ids[::-1].copy())
    return call(self, graph, wrong if get_parallel().tp_rank == 1 else batch, caches)


def logits_exchanged(self: Any, call: Any, graph: Any, batch: Any, caches: list[Any]) -> Any:
    """After the graph: nothing that was recorded is wrong."""
    return {name: np.roll(out, 1, axis=-1) for name, out in call(self, graph, batch, caches).items()}


CALLS: dict[str, Callable[..., Any]] = {
    "slots off by one": edit(lambda b: replace(b, slots=b.slots + 1)),
    "positions off by one": edit(lambda b: replace(b, positions=b.positions + 1)),
    "contexts without the new token": contexts_of_cached,
    "contexts that end the server": edit(lambda b: replace(b, context_lens=b.context_lens - 1)),
    "tables of another stride": edit(lambda b: replace(b, block_tables=b.block_tables.repeat(8, 1))),
    "layers exchanged": exchange(0, 2),
    "keys and values exchanged": exchange(0, 1),
    "pages of 16": pages_of_16,
    "prefill for a cached prefix": always_prefill,
    "decode for a new sequence": always_decode,
    "a copy of the pool": copied_pool,
    "another batch on rank 1": on_rank_1,
    "logits exchanged": logits_exchanged,
}


def others_weights(*names: str) -> Callable[[], None]:
    """On the last rank these are the first rank's; without names, all of them."""

    def plant() -> None:
        from msconv_runtime import binding

        real = binding.RankWeights

        class Planted(real):  # type: ignore[misc, valid-type]
            def array(self, name: str, dtype: str) -> Any:
                wrong = self.rank > 0 and (not names or name in names)
                source = real(ROOT[0], 0, "mmap") if wrong else self
                return real.array(source, name, dtype)

            def __init__(self, artifact: Any, rank: int, mode: Any = "mmap") -> None:
                ROOT[:] = [artifact]
                super().__init__(artifact, rank, mode)

        binding.RankWeights = Planted

    return plant


ROOT: list[Any] = []


def another_group() -> None:
    """Of the same ranks, but with a communicator of its own."""
    from msconv_runtime.sglang import groups

    real = groups.find_groups

    def planted(*args: Any) -> dict[str, str]:
        return dict.fromkeys(real(*args), "world:0")

    groups.find_groups = planted


def cast_too_much() -> None:
    import msgspec

    from msconv_runtime import graphs

    real = graphs.bind

    def planted(root: Any, graph: Any, *args: Any) -> Any:
        more = [*graph.nz, "model.embed_tokens.weight"]
        return real(root, msgspec.structs.replace(graph, nz=more), *args)

    graphs.bind = planted


def split_latent() -> None:
    """SGLang's own pool for NPUs, with latent and rotated key apart."""
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    own = KVCacheConfigurator._build_ascend_mla_kv_pool

    def planted(self: Any, *, max_total_num_tokens: int, mla_pool_class: Any) -> Any:
        return own(self, max_total_num_tokens=max_total_num_tokens, is_dsa_model=False)

    KVCacheConfigurator._build_mla_kv_pool = planted


def host_read() -> None:
    """Of the KV pool, by its address: what a hidden copy to the host does."""
    from msconv_runtime import graphs

    real = graphs.Graphs._call

    def read_the_pool(self: Any, graph: Any, batch: Any, caches: Any, hidden: Any) -> Any:
        if getattr(caches[0], "torch", None) is not None:
            ctypes.string_at(caches[0].torch.data_ptr(), 1)
        return real(self, graph, batch, caches, hidden)

    graphs.Graphs._call = read_the_pool


AT_LOAD: dict[str, Callable[[], None]] = {
    "host read": host_read,
    "expert_start": others_weights("expert_start"),
    "another rank's file": others_weights(),
    "another group": another_group,
    "NZ": cast_too_much,
    "latent split": split_latent,
}

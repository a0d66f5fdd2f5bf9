"""What a target is: every fact of a device that graphs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Device:
    """A kind of device.  `words`: in a sentence.  `is_host`: graphs run on this machine's own processors, in
    its memory, in any process.  `has_run`: graphs of msconv have run on one."""

    kind: Literal["cpu", "npu"]
    words: str
    is_host: bool
    has_run: bool


DEVICES = {
    "cpu": Device("cpu", "a CPU", is_host=True, has_run=True),
    "npu": Device("npu", "an NPU", is_host=False, has_run=False),
}


@dataclass(frozen=True)
class DeviceModel:
    """A device that a target's graphs run on.  `memory_bytes`: as the driver reports it, for one rank."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Paging:
    """What a target's attention takes.  `slots`: a page's, where the graphs fix it; else the server chooses one of
    `pages`, the best first: multiples of `multiple`, at most `elements` of a head in a page.  Heads are multiples
    of `head_multiple`, up to `head_limit` wide (0: any width)."""

    slots: int | None = None
    pages: tuple[int, ...] = (16,)
    multiple: int = 1
    elements: int = 0
    head_multiple: int = 1
    head_limit: int = 0


@dataclass(frozen=True)
class Target:
    """`kind`: the device, in SGLang's words.  `dtype`: of activations and caches.  `graphs`: (role, variant) of
    each; `draft_graphs`: those that an artifact with a draft has besides.  `operations`: the package of
    msconv.graph.

    `mask`: what a prefill mask holds where it hides, None for graphs without a mask input.  `nz`: matrices are
    cast to the NZ format at load.  `rounds_weights`: stored values may be rounded to the graphs' type.
    `only_dtype`: the one type that weights for it may be stored as.  `epsilon`: of rounding in `dtype`.

    `prefill_reads_cache`: the prefill graph attends to what earlier calls cached.  `decode_min_sequences`: fewer
    run faster in the prefill graph, unless the two differ in their experts or in latent attention.  `chip`: what
    CANN calls the device, and its version.  `cumulative_counts`: its sort of tokens by expert gives where those of
    each end, not how many they are.  `token_scales`: its products of int8 take a scale for each token.
    """

    name: str
    kind: Literal["cpu", "npu"]
    dtype: str
    graphs: tuple[tuple[str, str], ...]
    operations: str
    paging: Paging
    epsilon: float
    mask: float | None = None
    nz: bool = False
    rounds_weights: bool = True
    only_dtype: str = ""
    draft_graphs: tuple[tuple[str, str], ...] = ()
    prefill_reads_cache: bool = False
    decode_min_sequences: int = 0
    cumulative_counts: bool = False
    token_scales: bool = True
    chip: tuple[str, int] | None = None
    devices: tuple[DeviceModel, ...] = ()

    @property
    def device(self) -> Device:
        return DEVICES[self.kind]

"""Targets: every fact of a device that graphs are compiled for.

Every Target that this file makes is one, under its name: a new target is one more record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import UsageError

GIB = 1 << 30


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
    each.  `operations`: the set of msconv.graph.

    `mask`: what a prefill mask holds where it hides, None for graphs without a mask input.  `nz`: matrices are
    cast to the NZ format at load.  `rounds_weights`: stored values may be rounded to the graphs' type.
    `only_dtype`: the one type that weights for it may be stored as.  `epsilon`: of rounding in `dtype`.

    `prefill_reads_cache`: the prefill graph attends to what earlier calls cached.  `decode_min_sequences`: fewer
    run faster in the prefill graph, unless the two differ in their experts or in latent attention.  `chip`: what
    CANN calls the device, and its version.
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
    prefill_reads_cache: bool = False
    decode_min_sequences: int = 0
    chip: tuple[str, int] | None = None
    devices: tuple[DeviceModel, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"


# ATB's PagedAttention: page size * head size <= 128 * 128, rows aligned to 16 bytes (hiascend.com,
# ascendtb_01_0075).  With SGLang's smallest pages of 16 that is a head of 1024.
ATB = Paging(pages=(128, 64, 32, 16), multiple=16, elements=128 * 128, head_multiple=8, head_limit=1024)
ASCEND_GRAPHS = (("prefill", ""), ("decode", ""), ("verify", ""))

CPU = Target(
    name="cpu",
    kind="cpu",
    dtype="float32",
    graphs=(("prefill", ""), ("decode", ""), ("mixed", "compiled")),
    operations="cpu",
    paging=Paging(slots=1),
    epsilon=2**-24,
    rounds_weights=False,
    prefill_reads_cache=True,
    decode_min_sequences=3,  # it multiplies the other way round; measured at the shape of Qwen3-0.6B
)
ASCEND910B = Target(
    name="ascend910b",
    kind="npu",
    dtype="bfloat16",
    graphs=ASCEND_GRAPHS,
    operations="ascend",
    paging=ATB,
    epsilon=2**-8,
    mask=1.0,
    chip=("Ascend910B2", 2201),
    devices=(DeviceModel("910B, 32 GB", 32 * GIB), DeviceModel("910B, 64 GB", 64 * GIB)),
)
ASCEND910C = Target(
    name="ascend910c",
    kind="npu",
    dtype="bfloat16",
    graphs=ASCEND_GRAPHS,
    operations="ascend",
    paging=ATB,
    epsilon=2**-8,
    mask=1.0,
    chip=("Ascend910_9391", 2201),
    devices=(DeviceModel("910C, one of its two dies", 64 * GIB),),
)
ASCEND310P = Target(
    name="ascend310p",
    kind="npu",
    dtype="float16",
    graphs=ASCEND_GRAPHS,
    operations="ascend",
    paging=ATB,
    epsilon=2**-11,
    mask=-10000.0,
    nz=True,
    only_dtype="float16",
    chip=("Ascend310P3", 2002),
    devices=(DeviceModel("310P of a 300I Duo", 42 * GIB),),  # of its 48 GB the driver leaves so much
)

TARGETS = {target.name: target for target in list(vars().values()) if isinstance(target, Target)}


def target_named(name: str) -> Target:
    """Raises UsageError naming those there are."""
    if name not in TARGETS:
        raise UsageError(f"{name}: no such target.", f"Targets are: {', '.join(TARGETS)}.")
    return TARGETS[name]


def is_for_npu(name: str) -> bool:
    """Whether graphs of this target, which may be one that is not known here, run on an NPU."""
    return name not in TARGETS or not TARGETS[name].is_cpu

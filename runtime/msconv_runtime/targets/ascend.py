"""Ascend devices: 910B, 910C (Atlas A3) and 310P."""

from __future__ import annotations

from .ascend_figures import OF_310P, OF_910B, OF_910C
from .record import SWIGLU, DeviceModel, Paging, Target

GIB = 1 << 30

# ATB's PagedAttention: page size * head size <= 128 * 128, rows aligned to 16 bytes (hiascend.com,
# ascendtb_01_0075).  With SGLang's smallest pages of 16 that is a head of 1024.
ATB = Paging(pages=(128, 64, 32, 16), multiple=16, elements=128 * 128, head_multiple=8, head_limit=1024)
ASCEND_GRAPHS = (("prefill", ""), ("decode", ""), ("verify", ""))
ASCEND_DRAFT_GRAPHS = (("draft_extend", ""), ("draft_decode", ""))

ASCEND910B = Target(
    name="ascend910b",
    kind="npu",
    dtype="bfloat16",
    graphs=ASCEND_GRAPHS,
    draft_graphs=ASCEND_DRAFT_GRAPHS,
    operations="ascend",
    paging=ATB,
    epsilon=2**-8,
    mask=1.0,
    chip=("Ascend910B2", 2201),
    devices=(DeviceModel("910B, 32 GB", 32 * GIB), DeviceModel("910B, 64 GB", 64 * GIB)),
    figures=OF_910B,
    fusions=(SWIGLU,),
)
ASCEND910C = Target(
    name="ascend910c",
    kind="npu",
    dtype="bfloat16",
    graphs=ASCEND_GRAPHS,
    draft_graphs=ASCEND_DRAFT_GRAPHS,
    operations="ascend",
    paging=ATB,
    epsilon=2**-8,
    mask=1.0,
    chip=("Ascend910_9391", 2201),
    devices=(DeviceModel("910C, one of its two dies", 64 * GIB),),
    figures=OF_910C,
    fusions=(SWIGLU,),
)
ASCEND310P = Target(
    name="ascend310p",
    kind="npu",
    dtype="float16",
    graphs=ASCEND_GRAPHS,
    draft_graphs=ASCEND_DRAFT_GRAPHS,
    operations="ascend",
    paging=ATB,
    epsilon=2**-11,
    mask=-10000.0,
    nz=True,
    only_dtype="float16",
    cumulative_counts=True,
    token_scales=False,
    chip=("Ascend310P3", 2002),
    devices=(DeviceModel("310P of a 300I Duo", 42 * GIB),),  # of its 48 GB the driver leaves so much
    figures=OF_310P,
)

"""Published speeds of Ascend devices, with their sources.  Where sources differ the larger figure stands here: a
bound must hold for both.  Read on 29 November 2026."""

from __future__ import annotations

from .record import Figures

T, G = 1e12, 1e9

GUIDE = (
    "CANN's guide to operators across platforms: Atlas A2 (910B2): 353T/376T in BF16 and FP16, 64 GB, 1.6 TB/s",
    "https://gitcode.com/cann/ops-nn/blob/master/docs/zh/develop/cross_platform_migration_guide.md",
)
MODELLING = (
    "Huawei's MindStudio-Modeling, tensor_cast/device.py: products, memory and links of Atlas 800 A2 and A3",
    "https://gitcode.com/Ascend/msmodeling/tree/develop",
)
CLOUDMATRIX = (
    "Zuo et al., Serving Large Language Models on Huawei CloudMatrix384: a 910C has two dies, together 752 TFLOPS "
    "of BF16 and FP16 and 3.2 TB/s",
    "https://arxiv.org/abs/2506.12708",
)
DUO = (
    "Press on the Atlas 300I Duo, two 310P: 408 GB/s of LPDDR4X and 280 TOPS of INT8 a card",
    "https://infogioco.it/altro/tecnologia/huawei-sfida-le-sanzioni-usa-con-lacceleratore-atlas-300i-duo",
)

A2 = (GUIDE, MODELLING)
OF_910B = (
    Figures("910B1", None, None, None, None, None, 8, ()),
    Figures("910B2", 1.6 * T, 376 * T, 752 * T, 196 * G, 25 * G, 8, A2),
    Figures("910B3", 1.6 * T, 313 * T, 626 * T, 196 * G, 25 * G, 8, (MODELLING,)),
    Figures("910B4", 0.8 * T, 280 * T, 560 * T, 64 * G, None, 8, (MODELLING,)),  # 32 GB, joined by PCIe
    Figures("910B4-1", 1.6 * T, 280 * T, 560 * T, 196 * G, 25 * G, 8, (MODELLING,)),
)
OF_910C = (Figures("910C", 1.6 * T, 376 * T, 752 * T, 196 * G, None, 768, (CLOUDMATRIX, MODELLING)),)  # a die
OF_310P = (Figures("310P", 204 * G, None, 140 * T, None, None, 1, (DUO,)),)  # one of a card's two

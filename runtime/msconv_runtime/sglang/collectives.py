"""The groups that an artifact's graphs name: created in MindSpore over the server's tensor-parallel ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..artifact import Manifest
from ..errors import ArtifactError
from . import cpu

TP_GROUP = "msconv_tp"  # the name in every graph with collectives: the ranks that share one model
logger = logging.getLogger(__name__)


def create_groups(root: Path, manifest: Manifest, target: str, tp_group: Any) -> None:
    """Make every group exist that the target's graphs name.  All ranks of `tp_group` (SGLang's) call this."""
    names = group_names(root, manifest, target)
    if not names or tp_group.world_size == 1:
        return
    if target == "cpu":
        cpu.start_communication(tp_group)
    from mindspore.communication import create_group

    for name in names:
        create_group(name, tp_group.ranks, None if target == "cpu" else hccl_options(tp_group))
    logger.info("msconv: groups %s created over ranks %s", names, tp_group.ranks)


def group_names(root: Path, manifest: Manifest, target: str) -> list[str]:
    """Raises ArtifactError if the graphs want a group that we would not know how to make."""
    names = sorted({name for graph in manifest.graphs_for(target) for name in graph.groups})
    if unknown := [name for name in names if name != TP_GROUP]:
        raise ArtifactError(
            f"{root}: its {target} graphs use the groups {unknown}; this version knows {TP_GROUP} only.",
            f"Run `msconv compile {root} --target {target}` again, or use the msconv that compiled it.",
        )
    return names


def hccl_options(tp_group: Any) -> Any:
    """SGLang's HCCL communicator as MindSpore's: SGLang makes its own groups so.  Has not run on a device."""
    import torch
    from mindspore._c_expression import GroupOptions

    backend = tp_group.device_group._get_backend(torch.device("npu"))
    options = GroupOptions()
    options.hccl_config = {"hccl_comm": backend.get_hccl_comm(tp_group.local_rank)}
    return options

"""The groups that an artifact's graphs name, and what MindSpore calls them in a server.

On an NPU SGLang's runner has made its own groups known to MindSpore before the model loads: the graphs take those.
On a CPU it has not, and they are created here.
"""

from __future__ import annotations

import logging
from typing import Any

from ..artifact import Artifact
from ..errors import ArtifactError
from ..targets import Target
from . import cpu

TP_GROUP = "msconv_tp"  # the name in every graph with collectives: the ranks that share one model
logger = logging.getLogger(__name__)


def find_groups(artifact: Artifact, target: Target, tp_group: Any) -> dict[str, str]:
    """What MindSpore calls the groups that the target's graphs name.  All ranks of SGLang's `tp_group` call this.

    On an NPU that is the name of `tp_group`: SGLang's runner (`mindspore_runner.reuse_hccl_comm`) has created a
    group of this name from its HCCL communicator, and a second one on the same communicator is not needed.
    """
    names = group_names(artifact, target)
    if not names or tp_group.world_size == 1:
        return {}
    if not target.is_cpu:
        logger.info("msconv: groups %s are SGLang's %s, ranks %s", names, tp_group.unique_name, tp_group.ranks)
        return dict.fromkeys(names, tp_group.unique_name)
    cpu.start_communication(tp_group)
    from mindspore.communication import create_group

    for name in names:
        create_group(name, tp_group.ranks)
    logger.info("msconv: groups %s created over ranks %s", names, tp_group.ranks)
    return {}


def group_names(artifact: Artifact, target: Target) -> list[str]:
    """Raises ArtifactError if the graphs want a group that we would not know how to make."""
    names = sorted({name for graph in artifact.graphs(target.name) for name in graph.groups})
    if unknown := [name for name in names if name != TP_GROUP]:
        raise ArtifactError(
            f"{artifact.root}: its {target.name} graphs use the groups {unknown}; this version knows {TP_GROUP} "
            "only.",
            f"Run `msconv compile {artifact.root} --target {target.name}` again, or use the msconv that compiled "
            "it.",
        )
    return names

"""Groups of ranks: SGLang's own on an NPU, MindSpore's on a CPU.

On an NPU SGLang's runner has made its own groups known to MindSpore before the model loads: the graphs take those.
On a CPU it has not, and they are created here.
"""

from __future__ import annotations

import logging
from typing import Any

from ..artifact import Artifact
from ..collectives import create_groups, group_names
from ..serving.settings import Settings
from ..targets import Target

logger = logging.getLogger(__name__)


def find_groups(artifact: Artifact, target: Target, tp_group: Any) -> dict[str, str]:
    """What MindSpore calls the groups that the target's graphs name.  All ranks of SGLang's `tp_group` call this.

    On an NPU that is the name of `tp_group`: SGLang's runner (`mindspore_runner.reuse_hccl_comm`) has created a
    group of this name from its HCCL communicator, and a second one on the same communicator is not needed.
    """
    names = group_names(artifact, target)
    if not names or tp_group.world_size == 1:
        return {}
    if not target.device.is_host:
        logger.info("msconv: groups %s are SGLang's %s, ranks %s", names, tp_group.unique_name, tp_group.ranks)
        return dict.fromkeys(names, tp_group.unique_name)
    host = Settings.read().meeting_host
    create_groups(names, tp_group.ranks, tp_group.rank_in_group, host, tp_group.broadcast_object)
    return {}

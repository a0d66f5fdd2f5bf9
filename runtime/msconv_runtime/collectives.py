"""The groups that an artifact's graphs name, and what MindSpore calls those that it creates."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .artifact import Artifact
from .errors import ArtifactError
from .mccl import start_communication
from .mindir_check.allowed import TP_GROUP
from .targets import Target

logger = logging.getLogger(__name__)


def create_groups(
    names: list[str], ranks: list[int], rank: int, host: str, broadcast: Callable[[int | None], int]
) -> None:
    """Start MindSpore's communication among `ranks` and create the groups in it.  Each of them calls this with its
    own `rank`; the other arguments are `start_communication`'s."""
    start_communication(rank, len(ranks), host, broadcast)
    from mindspore.communication import create_group

    for name in names:
        create_group(name, ranks)
    logger.info("msconv: groups %s created over ranks %s", names, ranks)


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

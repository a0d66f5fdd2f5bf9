"""Operations of a CPU: MindSpore's own; in the variant `compiled`, kernels that are built where the graph runs."""

from __future__ import annotations

from msconv_runtime.roles import COMPILED

from ..operations import Operations
from ..spec import CannotCompute, Local
from .compiled import CompiledOperations
from .plain import PlainOperations


def operations(local: Local) -> Operations:
    """Raises CannotCompute for what the compiled kernels do not."""
    if local.variant != COMPILED:
        return PlainOperations(local)
    lacks = []
    if local.windows != (None,):
        lacks.append("a window of attention")
    if local.config.mla is None and not local.config.qk_norm:
        lacks.append("queries and keys without a norm")
    if lacks:
        raise CannotCompute(
            f"{local.title}: the compiled kernels do not compute {' or '.join(lacks)}.",
            "The target's other graphs serve it.",
        )
    return CompiledOperations(local)

"""Operations of Ascend devices.  In what 910B, 910C and 310P differ, their records say."""

from __future__ import annotations

from ..operations import Operations
from ..spec import CannotCompute, Local
from .fused import AscendOperations


def operations(local: Local) -> Operations:
    """Raises CannotCompute for windows: FlashAttentionScore and PagedAttention are called with masks that hide
    nothing but what comes later."""
    if windows := [w for w in local.windows if w is not None]:
        raise CannotCompute(
            f"{local.title}: its attention has no window, this model's has one of {', '.join(map(str, windows))} "
            "positions.",
            "Compile it for --target cpu.",
        )
    return AscendOperations(local)

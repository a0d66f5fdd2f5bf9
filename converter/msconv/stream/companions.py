"""What stands beside the codes of a matrix: what decodes them, and numbers that cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.dtypes import DTYPES

from ..layout.cuts import matrix
from ..layout.model import TensorInfo
from ..layout.plan import Plan
from ..quant.record import Decoder
from ..quant.scales import ZeroScales, as_numbers, refuse_numbers, refuse_used, zero_scales

VALUES = "float32"  # from which codes are made
ReadWhole = Callable[[TensorInfo], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Beside:
    """Of one matrix.  `decoder` None: it is moved as it is.  `zeros`: scales of 0, of the tensor `scales`."""

    decoder: Decoder | None = None
    scales: str = ""
    zeros: ZeroScales | None = None

    def check(self, codes: NDArray[np.uint8], first: int) -> None:
        """Rows of codes [R, C] from `first` on.  Raises CheckpointError if one that is not 0 has a scale of 0."""
        if self.zeros is not None:
            refuse_used(self.scales, self.zeros, codes, first)


NOTHING = Beside()


def beside(plan: Plan, name: str, read_moved: ReadWhole, read_shared: ReadWhole) -> Beside:
    """What stands beside this source.  `read_moved`: reads what no other unit moves; `read_shared`: what another
    does.  Raises CheckpointError for scales that cannot be right."""
    if name not in plan.formats:
        return NOTHING
    chosen, shape = plan.formats[name], matrix(plan.sources[name].shape)
    if plan.is_decoded(name):
        found = {n: read_moved(plan.sources[n]) for n in plan.decoded_with(name)}
        out = VALUES if name in plan.encoded else plan.tensors[plan.moves[name][0].tensor].dtype
        decoder = chosen.decoder(name, list(found.values()), DTYPES[out].numpy)
    else:
        found = {n: read_shared(plan.sources[n]) for n in plan.held_against(name)}
        decoder = None
    for stored in (s for s in chosen.sources[1:] if s.holds == "scales"):
        scales = stored.of(name)
        numbers = as_numbers(found[scales].reshape(-1).view(np.uint8), plan.sources[scales].dtype)
        if (zeros := zero_scales(chosen, shape, numbers)) is not None:
            return Beside(decoder, scales, zeros)
    return Beside(decoder)


def check_numbers(plan: Plan, name: str, data: NDArray[np.uint8], first: int) -> None:
    """Rows of a source from `first` on, as bytes.  Raises CheckpointError if it stands beside codes and has
    numbers that cannot be right."""
    stored = plan.beside_codes.get(name)
    if stored is not None:
        refuse_numbers(name, stored, as_numbers(data, plan.sources[name].dtype), first)

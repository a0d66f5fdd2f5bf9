"""What the layers of an Ascend graph share: a tuple that is made once a step, from the batch, and the names of its
items."""

from __future__ import annotations


class AscendStep:
    """COS, SIN: [T, D].  MASK: as the server made it, see msconv_runtime.paging.attention_mask."""

    COS, SIN, SLOTS, TABLES, CONTEXT_LENS, Q_LENS, MASK = range(7)

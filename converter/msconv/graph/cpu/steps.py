"""What the layers of a CPU graph share: a tuple that is made once a step, and the names of its items.

(Items are named by numbers: a NamedTuple is an object of Python's, which a MindIR cannot hold.)
"""

from __future__ import annotations


class Step:
    """What each begins with.  COS, SIN: [T, ..], for the rotation.  SLOTS [T].  TABLES [B, P]."""

    COS, SIN, SLOTS, TABLES = range(4)


class DecodeStep(Step):
    """One token a sequence: T = B.  MASKS: [B, H, S], one for each of the model's windows.  SPREAD [B, H, K]: rows
    of [B*(H+K) + 1, D].  DIAGONAL [B, H]: rows of [B*H*K, D]."""

    MASKS, SPREAD, DIAGONAL = range(4, 7)


class RaggedStep(Step):
    """Ragged sequences, laid out as [B, L] with L the longest.  MASKS: [B, H, L, S], one for each of the model's
    windows.  QUERIES [B, H, L]: rows of [T*(H+K), D].  KEYS [B, K, S]: rows of [B*S*K, D].  BACK [T, H]: rows of
    [B*H*L, D].  LAST [B]: rows of [T, hidden]."""

    MASKS, QUERIES, KEYS, BACK, LAST = range(4, 9)


class CompiledStep(Step):
    """The batch as it came, for compiled kernels.  LAST [B]: rows of [T, hidden]."""

    CONTEXT_LENS, Q_LENS, LAST = range(4, 7)

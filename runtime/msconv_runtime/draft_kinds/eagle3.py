"""Drafts of EAGLE3, which read residual streams of their target."""

from __future__ import annotations

from .record import DraftKind

EAGLE3 = DraftKind("eagle3", "EAGLE3", ("EAGLE3",), usual_layers=lambda layers: (2, layers // 2, layers - 3))

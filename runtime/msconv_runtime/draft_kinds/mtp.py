"""The layer of multi-token prediction (MTP, NextN) among a model's own weights."""

from __future__ import annotations

from .record import DraftKind

MTP = DraftKind("mtp", "multi-token prediction", ("EAGLE", "NEXTN"), suffix="NextN")

"""The roles that serve a decoder-only model."""

from __future__ import annotations

from .record import Role

PREFILL = Role("prefill", begins=True)
DECODE = Role("decode", new_tokens="one")  # on Ascend any number, after any prefix
VERIFY = Role("verify", rows="all")  # logits of every new token: of a prompt, or of drafts
MIXED = Role("mixed")  # any batch: new tokens and prefixes of any length

"""The roles of what guesses further tokens, from tokens and the hidden states of those before them."""

from __future__ import annotations

from .record import HIDDEN, LOGITS, Role

DRAFT_EXTEND = Role("draft_extend", begins=True, outputs=(LOGITS, HIDDEN), is_draft=True)
DRAFT_DECODE = Role("draft_decode", new_tokens="one", outputs=(LOGITS, HIDDEN), is_draft=True)

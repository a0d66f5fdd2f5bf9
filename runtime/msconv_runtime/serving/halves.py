"""One of two servers that share the work: one prefills prompts, the other decodes, and keys and values move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UsageError

Mode = Literal["prefill", "decode"]
MODES: tuple[Mode, ...] = get_args(Mode)
BOOTSTRAP_PORT = 8998  # SGLang's


@dataclass(frozen=True)
class Half:
    """`bootstrap_port`: of the prefill server, where the decode server asks what it is and where its ranks are."""

    mode: Mode
    bootstrap_port: int = BOOTSTRAP_PORT

    def check(self, port: int) -> None:
        """Raises UsageError if the server itself listens at the bootstrap port."""
        if self.mode == "prefill" and port == self.bootstrap_port:
            raise UsageError(
                f"--bootstrap-port {port}: the server itself listens there.", "Give another --bootstrap-port."
            )


def chosen_half(disaggregation: str | None, bootstrap_port: int | None) -> Half | None:
    """What the options ask for; None for a server that does both.  Raises UsageError for a port without a mode."""
    found = next((m for m in MODES if m == disaggregation), None)
    if found is None and bootstrap_port is not None:
        raise UsageError(
            f"--bootstrap-port {bootstrap_port}: a server that prefills and decodes has none.",
            "Add --disaggregation prefill or decode, or leave it out.",
        )
    return None if found is None else Half(found, bootstrap_port or BOOTSTRAP_PORT)

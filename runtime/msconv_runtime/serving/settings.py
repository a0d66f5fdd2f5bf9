"""Settings of a server's processes: written by `msconv serve`, read where the artifact is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..targets import CPU

if TYPE_CHECKING:
    from ..artifact.weights import LoadMode  # its module needs numpy

LOCALHOST = "127.0.0.1"
TARGET = "MSCONV_TARGET"  # whose graphs
REQUIRE_SIGNATURE = "MSCONV_REQUIRE_SIGNATURE"


@dataclass(frozen=True)
class Settings:
    """What `msconv serve` tells the processes of a server, through the environment.

    strict_aot: a start that would compile for other shapes fails.  check_digests: every digest of the rank is
    compared before it loads.  load_mode: `mmap` or `read`.  target: whose graphs.  meeting_host: where the ranks
    of a CPU server meet.  ranks_here: how many share this machine's processors, 0 for all of the artifact's.
    require_signature: the public key, in a file, by whose owner the artifact must be signed; "" for none.
    ui: serve the chat page.
    """

    strict_aot: bool = True
    check_digests: bool = False
    load_mode: LoadMode = "mmap"
    target: str = CPU.name
    meeting_host: str = LOCALHOST
    ranks_here: int = 0
    require_signature: str = ""
    ui: bool = False

    def environment(self) -> dict[str, str]:
        """What differs from the defaults, and what this process's environment has."""
        values = {f"MSCONV_{f.name.upper()}": (getattr(self, f.name), f.default) for f in fields(self)}
        needed = {name: value for name, (value, usual) in values.items() if value != usual or name in os.environ}
        return {name: str(int(v) if isinstance(v, bool) else v) for name, v in needed.items()}

    @staticmethod
    def read() -> Settings:
        """From this process's environment.  Raises UsageError for a load mode that there is not."""
        mode, ranks = os.environ.get("MSCONV_LOAD_MODE", "mmap"), os.environ.get("MSCONV_RANKS_HERE", "0")
        if mode not in ("mmap", "read"):
            raise UsageError(f"MSCONV_LOAD_MODE={mode}: mmap or read.")
        return Settings(
            os.environ.get("MSCONV_STRICT_AOT", "1") != "0",
            os.environ.get("MSCONV_CHECK_DIGESTS", "0") == "1",
            "mmap" if mode == "mmap" else "read",
            os.environ.get(TARGET, CPU.name),
            os.environ.get("MSCONV_MEETING_HOST", LOCALHOST),
            int(ranks) if ranks.isdecimal() else 0,
            os.environ.get(REQUIRE_SIGNATURE, ""),
            os.environ.get("MSCONV_UI", "0") == "1",
        )


USUAL = Settings()

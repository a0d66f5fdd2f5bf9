"""What msconv measures of its own process."""

from __future__ import annotations

from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far.  (getrusage would report that of who started it.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0

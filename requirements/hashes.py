"""Hashes of packages: writes into each requirements/*.txt those of every file of each version that it names.

For all processors and Pythons, as the package index lists them, by uv: `make hashes` runs this after a version was
changed.  pip then installs no file that is not listed.  torch's builds for a CPU come from an index of its own:
their hashes are in torch-cpu.sha256, as `sha256sum` prints them, and a new version of torch needs new ones there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
PIN = re.compile(r"([A-Za-z0-9][\w.-]*)==([\w.+!-]+)")
COMPILE = "pip compile --no-config --no-deps --generate-hashes --no-annotate --no-header --universal --quiet"


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, set[str]]:
    """Hashes by `name==version`, the name normalised."""
    found: dict[str, set[str]] = {}
    pin = ""
    for line in text.splitlines():
        if named := PIN.match(line):
            pin = f"{normal(named[1])}=={named[2]}"
            found[pin] = set()
        if pin:
            found[pin] |= set(HASH.findall(line))
    return found


def cpu_builds() -> dict[str, set[str]]:
    """Hashes of torch's builds for a CPU, by `torch==version`."""
    found: dict[str, set[str]] = {}
    for line in (HERE / "torch-cpu.sha256").read_text().splitlines():
        digest, name = line.split()
        found.setdefault(f"torch=={name.split('-')[1].removesuffix('+cpu')}", set()).add(digest)
    return found


def hashed(text: str, uv: str) -> str:
    """The same lines in the same order, each version followed by its hashes.  Ends the program if one has none."""
    kept = [line.removesuffix("\\").rstrip() for line in text.splitlines() if not line.startswith(" ")]
    wanted = "\n".join(line for line in kept if PIN.match(line))
    command = [uv, *COMPILE.split(), "--python-version", "3.11", "-"]
    done = subprocess.run(command, input=wanted, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    listed, cpu = pins(done.stdout), cpu_builds()
    lines = []
    for line in kept:
        lines.append(line)
        for pin in pins(line):
            if not listed.get(pin) or (pin.startswith("torch==") and pin not in cpu):
                sys.exit(f"{pin}: no hash of it is known; torch's are in torch-cpu.sha256 too.")
            lines += [f"    --hash=sha256:{digest}" for digest in sorted(listed[pin] | cpu.get(pin, set()))]
    return re.sub(r"\n(?=    --hash)", " \\\\\n", "\n".join(lines)) + "\n"


def main() -> None:
    for path in sorted(HERE.glob("*.txt")):
        text = path.read_text()
        path.write_text(hashed(text, sys.argv[1]))
        print(f"{path.name}: {len(pins(text))} packages")


if __name__ == "__main__":
    main()

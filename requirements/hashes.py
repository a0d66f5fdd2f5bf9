"""Hashes of packages: writes into each requirements/*.txt those of every file of each version that it names.

For all processors and Pythons, as the package index lists them, by uv: `make hashes` runs this after a version was
changed.  pip then installs no file that is not listed.  torch.txt stays as it is: its files are of another index.
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


def hashed(text: str, uv: str) -> str:
    """The same lines in the same order, each version followed by its hashes.  Ends the program if one has none."""
    kept = [line.removesuffix("\\").rstrip() for line in text.splitlines() if not line.startswith(" ")]
    wanted = "\n".join(line for line in kept if PIN.match(line))
    command = [uv, *COMPILE.split(), "--python-version", "3.11", "-"]
    done = subprocess.run(command, input=wanted, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    listed = pins(done.stdout)
    lines = []
    for line in kept:
        lines.append(line)
        for pin in pins(line):
            if not listed.get(pin):
                sys.exit(f"{pin}: the index has no hash of it.")
            lines += [f"    --hash=sha256:{digest}" for digest in sorted(listed[pin])]
    return re.sub(r"\n(?=    --hash)", " \\\\\n", "\n".join(lines)) + "\n"


def main() -> None:
    for path in sorted(set(HERE.glob("*.txt")) - {HERE / "torch.txt"}):
        text = path.read_text()
        path.write_text(hashed(text, sys.argv[1]))
        print(f"{path.name}: {len(pins(text))} packages")


if __name__ == "__main__":
    main()

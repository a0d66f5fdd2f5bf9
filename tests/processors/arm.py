"""A Python for aarch64 with what `convert` needs, run by QEMU: Debian's packages and wheels, only unpacked.

    python tests/processors/arm.py DIRECTORY

Writes DIRECTORY/python, which runs it.  Needs apt-get, dpkg-deb, pip and qemu-aarch64; the system stays as it is.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

DEBIAN = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libexpat1",
    "libffi8",
    "libssl3",
    "libbz2-1.0",
    "liblzma5",
    "libsqlite3-0",
    "libuuid1",
    "libcrypt1",
)
WHEELS = (
    "numpy==1.26.4",
    "msgspec",
    "xxhash",
    "click",
    "rich",
    "filelock",
    "pyyaml",
    "ml_dtypes",
    "jinja2",
    "markupsafe",
    "markdown-it-py",
    "mdurl",
    "pygments",
)
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64")
SCRIPT = """#!/bin/sh
exec qemu-aarch64 -L {root} -E LD_LIBRARY_PATH={root}/usr/lib/aarch64-linux-gnu:{root}/lib/aarch64-linux-gnu \\
  -E PYTHONHOME={root}/usr -E PYTHONDONTWRITEBYTECODE=1 -E PYTHONPATH={site}:"$PYTHONPATH" \\
  {root}/usr/bin/python3.11 "$@"
"""


def make(directory: Path) -> None:
    root, site, apt = (directory / name for name in ("root", "site", "apt"))
    for place in (root, site, apt / "state/lists/partial", apt / "cache/archives/partial"):
        place.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    subprocess.run(["apt-get", *options, "update", "-qq"], check=True)
    subprocess.run(["apt-get", *options, "download", "-qq", *DEBIAN], check=True, cwd=apt)
    for package in sorted(apt.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    kinds = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*pip, *kinds, "--python-version", "3.11", "-d", apt, *WHEELS], check=True)
    for wheel in sorted(apt.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    script = directory / "python"
    script.write_text(SCRIPT.format(root=root, site=site))
    script.chmod(0o755)


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())

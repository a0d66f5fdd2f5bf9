"""Prefill and decode by two of SGLang's servers: its flags, what they need, and what must not be asked of them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping

from ..doctor import Finding, Machine
from ..doctor.findings import SERVE
from ..serving.halves import BOOTSTRAP_PORT, Half
from ..serving.ready import EVERYWHERE
from ..targets import Target
from .speculation import ALGORITHM, DRAFT_PATHS

MODE, BACKEND, BOOTSTRAP = (
    "--disaggregation-mode",
    "--disaggregation-transfer-backend",
    "--disaggregation-bootstrap-port",
)
BACKUP = "--disaggregation-decode-retraction-backup"
NO_OVERLAP = "--disable-overlap-schedule"
ROUTER = "sglang-router"
COPIES = ("--dp-size", "--dp", "--data-parallel-size")
DEBIAN = "libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200 libnuma1"
STORE, WITH_MOONCAKE = "ASCEND_MF_STORE_URL", "ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE"
TRUE = ("1", "true", "True", "TRUE")


def half_flags(half: Half, target: Target) -> dict[str, str]:
    """For an NPU from SGLang's source; has not run on a device."""
    ascend = not target.device.is_host and not _has_mooncake_for_ascend(os.environ)
    flags = {MODE: half.mode, BACKEND: "ascend" if ascend else "mooncake", BOOTSTRAP: str(half.bootstrap_port)}
    if target.device.is_host:  # the other choice of each uses CUDA's events, and its pinned memory
        flags |= {NO_OVERLAP: ""} if half.mode == "prefill" else {BACKUP: "cpu_tensor"}
    return flags


def half_environment(target: Target, host: str) -> dict[str, str]:
    """TCP in place of RDMA on a CPU, and keys and values where the server itself is, unless the user has said."""
    found = {"MC_FORCE_TCP": "1", "MOONCAKE_PROTOCOL": "tcp"} if target.device.is_host else {}
    found |= {"SGLANG_HOST_IP": host} if host not in EVERYWHERE else {}
    return {name: value for name, value in found.items() if name not in os.environ}


def half_findings(machine: Machine, target: Target) -> Iterator[Finding]:
    """What a server of this kind needs and that is not there.  Imports mooncake, in a process of its own."""
    if machine.version("prometheus_client") is None:
        yield _missing("prometheus_client", "not installed", "`pip install prometheus_client`")
    if target.device.is_host or _has_mooncake_for_ascend(machine.environ):
        yield from _mooncake_findings()
    elif machine.version("memfabric_hybrid") is None:
        yield _missing(
            "memfabric_hybrid",
            "not installed",
            f"`pip install memfabric_hybrid`, or set {WITH_MOONCAKE}=1 where mooncake is built for Ascend",
        )


def _mooncake_findings() -> Iterator[Finding]:
    if importlib.util.find_spec("mooncake") is None:
        hint = f"`pip install 'msconv[pd]'`, and on Debian `apt-get install {DEBIAN}`"
        yield _missing("mooncake", "not installed", hint)
        return
    done = subprocess.run([sys.executable, "-c", "import mooncake.engine"], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it does not import"])[-1][:200]
        yield _missing(
            "mooncake",
            said.removeprefix("ImportError: "),
            f"`apt-get install {DEBIAN}` has its libraries on Debian",
        )


def _missing(name: str, found: str, hint: str) -> Finding:
    return Finding(name, "missing", found, "for --disaggregation", hint, SERVE)


def half_problems(target: Target, given: Mapping[str, str], elsewhere: bool) -> list[str]:
    """Why the user's flags do not go with one of two servers, each with what to do."""
    problems = []
    for flag in (ALGORITHM, *DRAFT_PATHS):
        if flag in given:
            problems.append(f"{flag}: drafts between a prefill and a decode server are not served.  Leave it out")
    for flag in COPIES:
        if given.get(flag, "1") != "1":
            problems.append(f"{flag} {given[flag]}: each of the two servers is one copy.  Start several of them")
    if "--enable-mixed-chunk" in given:
        problems.append("--enable-mixed-chunk: no server does both, prompts and further tokens.  Leave it out")
    store = _has_mooncake_for_ascend(os.environ) or STORE in os.environ
    if not target.device.is_host and not elsewhere and not store:
        problems.append(f"{STORE} is not set.  Set it to tcp://HOST:PORT of the prefill server's machine, on both")
    return problems


def half_notes(target: Target) -> list[str]:
    if not target.device.is_host:
        return ["--disaggregation on an NPU was written from SGLang's source; nobody has run it."]
    return [
        "mooncake listens at all addresses, whatever --host says, and asks nobody who he is: keep others away."
    ]


def _has_mooncake_for_ascend(environ: Mapping[str, str]) -> bool:
    return environ.get(WITH_MOONCAKE, "") in TRUE


def next_steps(
    mode: str, root: str, own: str, port: int, bootstrap_port: int, request: str, more: str = ""
) -> list[str]:
    """Lines for people: the other server, the router in front of both, and a request to it.

    `own`: this server's address.  `request`: a curl command for the router's address, `next_address`.  `more`:
    SGLang's flags that the other server needs too.
    """
    prefill, decode = (own, _other(own, port, 1)) if mode == "prefill" else (_other(own, port, -1), own)
    router = next_address(mode, own, port)
    host, _, router_port = router.removeprefix("http://").rpartition(":")
    lines = []
    if mode == "prefill":
        other = f"msconv serve {shlex.quote(root)} --disaggregation decode --port {port + 1}"
        lines.append(f"  next:   {other}{_named(bootstrap_port)}{more and f' -- {more}'}")
    else:
        lines.append(f"  needs:  a prefill server of the same artifact; here it is taken to be at {prefill}")
    command = (
        f"python -m sglang_router.launch_router --pd-disaggregation --mini-lb --host {host} --port {router_port} "
        f"--prefill {prefill} {bootstrap_port} --decode {decode}"
    )
    there = "" if _has_router() else f"  # `pip install {ROUTER}`"
    return [*lines, f"  router: {command}{there}", f"  try:    {request}"]


def next_address(mode: str, own: str, port: int) -> str:
    """Where the router is told to listen: one port after both servers."""
    return _other(own, port, 2 if mode == "prefill" else 1)


def _other(own: str, port: int, step: int) -> str:
    return f"{own.removesuffix(str(port))}{port + step}"


def _named(bootstrap_port: int) -> str:
    return "" if bootstrap_port == BOOTSTRAP_PORT else f" --bootstrap-port {bootstrap_port}"


def _has_router() -> bool:
    return importlib.util.find_spec("sglang_router") is not None

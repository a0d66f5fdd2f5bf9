"""Where SGLang's ranks find each other: torch's store, at one address instead of all that the machine has."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

SCHEME = "msconv"  # of torch's init_method, in place of tcp
LOOPBACK = "127.0.0.1"
TIMEOUT = timedelta(seconds=300)
logger = logging.getLogger(__name__)


def meeting_url(url: str, machines: int) -> str:
    """`tcp://host:port` as one of ours; on one machine the ranks meet at its loopback.  Other schemes stay."""
    parts = urlsplit(url)
    if parts.scheme != "tcp":
        return url
    host = parts.netloc.rpartition(":")[0] if machines > 1 else LOOPBACK
    return f"{SCHEME}://{host}:{parts.port}"


def register() -> None:
    """Tell torch of SCHEME.  Idempotent."""
    from torch.distributed.rendezvous import register_rendezvous_handler

    try:
        register_rendezvous_handler(SCHEME, meet)
    except RuntimeError:  # it is known
        return


def meet(url: str, timeout: timedelta = TIMEOUT, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """A handler as torch wants it: the store, this rank, and how many there are."""
    from torch.distributed import TCPStore

    parts = urlsplit(url)
    query = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
    rank, size = query["rank"], query["world_size"]
    host, port = str(parts.hostname), int(parts.port or 0)
    listen = {"master_listen_fd": listening(host, port)} if rank == 0 else {}
    store = TCPStore(host, port, size, rank == 0, timeout, wait_for_workers=False, **listen)
    yield store, rank, size
    raise RuntimeError("torch's ranks met once: another rendezvous at the same address was not expected")


def listening(host: str, port: int) -> int:
    """The descriptor of a socket that listens at `host`; if that is no address of this machine, at all of them."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(address)
    except OSError as e:
        logger.warning(
            "msconv: %s is no address of this machine (%s): the ranks meet at all it has", host, e.strerror
        )
        s.bind(("", port) if family == socket.AF_INET else ("::", port))
    s.listen(socket.SOMAXCONN)
    return s.detach()


def one_machine_environment() -> dict[str, str]:
    """Gloo's groups listen at the loopback too, unless the user has said where."""
    there = any(name == "lo" for _, name in socket.if_nameindex())
    return {"GLOO_SOCKET_IFNAME": "lo"} if there and "GLOO_SOCKET_IFNAME" not in os.environ else {}

"""The port that a server will listen at."""

from __future__ import annotations

import errno
import socket

from ..errors import EnvironmentProblem


def refuse_taken(host: str, port: int, flag: str = "--port") -> None:
    """Raises EnvironmentProblem if no server can listen there: engines find out after loading the model."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except OSError as e:
        taken = e.errno == errno.EADDRINUSE
        raise EnvironmentProblem(
            f"Nothing can listen at {host} port {port}: {e.strerror}.",
            f"Another server may be running there; give another {flag}." if taken else "Give another --host.",
        ) from None

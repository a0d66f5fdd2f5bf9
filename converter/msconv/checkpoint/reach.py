"""Whether a hub can be reached at all, known within seconds: its client would try again for a minute."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

ENOUGH_S = 2.0


def unreachable(url: str) -> str:
    """Why nothing answers where this URL leads, or at its proxy; "" if something does, or a proxy hides it."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    said: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), ENOUGH_S).close()
            said.append("")
        except socket.gaierror:
            said.append(f"the name {host} cannot be looked up")
        except OSError as e:
            said.append(f"{host} port {port}: {e.strerror or e}")
        except (UnicodeError, OverflowError, ValueError):
            said.append("")  # no such address can be: the hub's client says why

    asking = threading.Thread(target=connect, daemon=True)  # looking a name up cannot be bounded otherwise
    asking.start()
    asking.join(ENOUGH_S)
    return said[0] if said else f"{host} did not answer within {ENOUGH_S:.0f} s"

"""Whether the hub's client is installed: the extra `hub`, which everything but the hub does without."""

from __future__ import annotations

from importlib.util import find_spec

from msconv_runtime.errors import EnvironmentProblem


def require_client(what: str, otherwise: str = "") -> None:
    """Before the first import of a module that asks a hub.  `what` needs it; `otherwise`: what would do instead.
    Raises EnvironmentProblem."""
    if find_spec("huggingface_hub") is None:
        raise EnvironmentProblem(
            f"{what}: the hub's client (huggingface_hub) is not installed.",
            f'Install it: pip install "msconv[hub]"{otherwise}.',
        )

"""MindSpore, as far as one must know of it before it is imported."""

from __future__ import annotations

from msconv_runtime.errors import EnvironmentProblem


def mindspore_version() -> str:
    """Raises EnvironmentProblem if mindspore is not installed."""
    try:
        import mindspore
    except ImportError as e:
        raise EnvironmentProblem(
            f"mindspore cannot be imported ({e}).", 'Install it: pip install "msconv[compile]".'
        ) from None
    return str(mindspore.__version__)

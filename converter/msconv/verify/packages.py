"""What a proof and a rehearsal need besides msconv: asked before anything that imports it."""

from __future__ import annotations

from importlib import import_module

from msconv_runtime.errors import EnvironmentProblem

PACKAGES = ("torch", "safetensors", "transformers")


def require_reference() -> None:
    """Raises EnvironmentProblem if the reference model cannot run here."""
    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError as e:
            raise EnvironmentProblem(
                f"The reference model needs {', '.join(PACKAGES[:-1])} and {PACKAGES[-1]}: {name} cannot be "
                f"imported ({e}).",
                'Install them: pip install "msconv[verify]".',
            ) from None

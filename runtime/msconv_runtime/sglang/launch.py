"""`use_cpu` where programs of before import it from."""

from .environment import use_cpu

__all__ = ["use_cpu"]

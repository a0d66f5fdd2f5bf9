"""What msconv asks of a serving engine, and the engines that there are.

An engine's folder, beside this one, has `engine.py` with `ENGINE`; its name is the folder's.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from ..artifact import Artifact
from ..doctor import Finding, Machine, Needs
from ..errors import UsageError
from ..kv_pool import Pool
from ..targets import Target
from .halves import Half
from .nodes import Nodes

DEFAULT = "sglang"
CHOICE = "MSCONV_ENGINE"  # which engine serves, where it is not the default
FOLDERS = Path(__file__).parents[1]


class Engine(ABC):
    """A server that runs an artifact's graphs.  Its methods decide; they start nothing and import nothing heavy.

    `title`: in messages.  `needs`: its packages, the versions that were tried, the environment variables that it
    reads.  `aliases`: other spellings of its flags.  `set_elsewhere`: flags that a recipe must not name under
    `serve`, without their dashes, with the recipe's key that gives each.
    """

    title: str
    needs: Needs
    aliases: Mapping[str, tuple[str, ...]] = {}
    set_elsewhere: Mapping[str, str] = {}

    @abstractmethod
    def command(self) -> list[str]:
        """The program, before its flags."""

    @abstractmethod
    def flags(self, artifact: Artifact, target: Target, nodes: Nodes, host: str, port: int) -> dict[str, str]:
        """Flags that serve the artifact with a target's graphs; "" for one that takes no value."""

    @abstractmethod
    def sized(self, context: int, requests: int) -> dict[str, int]:
        """Flags, without their dashes, for so many requests at a time of so many tokens."""

    @abstractmethod
    def environment(self, target: Target, ranks: int, machines: int) -> dict[str, str]:
        """What a server of so many ranks, over all machines, gets beside this process's environment."""

    @abstractmethod
    def copies(self, given: Mapping[str, str]) -> int:
        """How many copies of the model the user's flags ask for."""

    @abstractmethod
    def pool(self, artifact: Artifact, target: Target, given: Mapping[str, str]) -> Pool:
        """The KV pool that a server with the user's flags makes.  `tokens` is 0 where no flag says how many."""

    @abstractmethod
    def problems(self, artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
        """Why the user's flags do not fit the artifact, or its pool the target's graphs; each with what to do."""

    def untried(self, given: Mapping[str, str]) -> list[str]:
        """The user's flags that are passed on and that nobody has tried with an artifact."""
        return []

    def drafts(self, given: Mapping[str, str]) -> list[Artifact]:
        """Other artifacts that the user's flags load beside the one that is served, as far as they can be read."""
        return []

    def half_flags(self, half: Half, target: Target) -> dict[str, str]:
        """Flags of a server that only prefills or only decodes, beside `flags`.  Raises UsageError where
        the engine has no such servers."""
        raise UsageError(
            f"{self.title}: has no servers that only prefill or only decode.", "Leave out the option."
        )

    def half_environment(self, target: Target, host: str) -> dict[str, str]:
        """What such a server gets beside `environment`."""
        return {}

    def half_findings(self, machine: Machine, target: Target) -> list[Finding]:
        """What such a server needs of this machine, and that is not there."""
        return []

    def half_problems(self, target: Target, given: Mapping[str, str], elsewhere: bool) -> list[str]:
        """Why the user's flags do not go with such a server."""
        return []

    def half_notes(self, target: Target) -> list[str]:
        """What a user must know of such servers before they start."""
        return []

    def notes(self, target: Target, given: Mapping[str, str]) -> list[str]:
        """What the engine does otherwise than the user's flags let one expect."""
        return []

    def without_keys(self, argv: list[str]) -> list[str]:
        """A command for a log: keys and passwords in it are not shown."""
        return argv


def engine_names() -> list[str]:
    return sorted(path.parent.name for path in FOLDERS.glob("*/engine.py") if path.parent != Path(__file__).parent)


def engine_named(name: str) -> Engine:
    """Raises UsageError naming those there are."""
    if name not in engine_names():
        raise UsageError(f"{name[:80]}: no such serving engine.", f"Engines are: {', '.join(engine_names())}.")
    found = import_module(f"{__package__.rpartition('.')[0]}.{name}.engine").ENGINE
    assert isinstance(found, Engine)
    return found


def chosen_engine() -> Engine:
    """SGLang, or the one that MSCONV_ENGINE names."""
    return engine_named(os.environ.get(CHOICE) or DEFAULT)

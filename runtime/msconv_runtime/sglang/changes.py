"""Changes to SGLang's functions and methods, made together: all of them, or none.

SGLang has a registry for what plug-ins change.  For each function it looks through all names of all modules,
which takes 0.04 s among a server's six thousand, in each of its processes.  Here all functions are looked for at
once, and methods, which are found by their class, not at all.  What other plug-ins change by the registry is
changed after, and around, this.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from .garbage import no_search

Function = Callable[..., Any]


@dataclass(frozen=True)
class Change:
    """`place`: the dotted name of a function or method.  `around` makes what is called instead of it."""

    place: str
    around: Callable[[Function], Function]


def instead(place: str, decide: Function) -> Change:
    """`decide` gets the original and the arguments, and returns the result."""

    def around(original: Function) -> Function:
        @functools.wraps(original)
        def changed(*args: Any, **kwargs: Any) -> Any:
            return decide(original, *args, **kwargs)

        return changed

    return Change(place, around)


def before(place: str, look: Function) -> Change:
    """`look` gets the arguments, and returns None or others as (arguments, named arguments)."""

    def decide(original: Function, *args: Any, **kwargs: Any) -> Any:
        if (other := look(*args, **kwargs)) is not None:
            args, kwargs = other
        return original(*args, **kwargs)

    return instead(place, decide)


def after(place: str, look: Function) -> Change:
    """`look` gets the result and the arguments, and returns None or another result."""

    def decide(original: Function, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        other = look(result, *args, **kwargs)
        return result if other is None else other

    return instead(place, decide)


def make(changes: Iterable[Change]) -> dict[str, str]:
    """Make all changes, and return {}; or none, and return the places that are not there, with the reasons."""
    changes = list(changes)
    holders: dict[str, Any] = {}
    lacking: dict[str, str] = {}
    with no_search():
        for place in dict.fromkeys(change.place for change in changes):
            try:
                holders[place] = _holder(place)
            except (ImportError, AttributeError) as e:
                lacking[place] = str(e)
    if lacking:
        return lacking
    places = {place: (holder, place.rpartition(".")[2]) for place, holder in holders.items()}
    originals = {place: getattr(holder, name) for place, (holder, name) in places.items()}
    for change in changes:
        holder, name = places[change.place]
        setattr(holder, name, change.around(getattr(holder, name)))
    functions = [place for place, (holder, _) in places.items() if isinstance(holder, ModuleType)]
    _change_imported({id(originals[place]): getattr(*places[place]) for place in functions})
    return {}


def _holder(place: str) -> Any:
    """The module or class that has a function; it is imported.  Raises ImportError or AttributeError where there
    is no such place."""
    path, _, name = place.rpartition(".")
    try:
        holder: Any = import_module(path)
    except ModuleNotFoundError as e:
        module, _, kind = path.rpartition(".")
        if not module or not path.startswith(str(e.name)):
            raise  # something else is missing
        holder = getattr(import_module(module), kind)
    getattr(holder, name)
    return holder


def _change_imported(changed: dict[int, Function]) -> None:
    """What modules have imported by name is changed there too.  `changed`: by the identity of the original."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            names = vars(module)
            names.update([(name, changed[id(value)]) for name, value in [*names.items()] if id(value) in changed])

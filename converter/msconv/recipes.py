"""Recipes: deployments written down in YAML (model, layout, devices it is sized for, serve flags).  Reads and
checks them; asks no hub and runs nothing."""

from __future__ import annotations

import datetime
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from msconv_runtime.dtypes import VALUE_DTYPES, ValueDtype
from msconv_runtime.errors import MsconvError, UsageError
from msconv_runtime.serving.engine import chosen_engine
from msconv_runtime.targets import TARGETS, Kind, device_of

DIRECTORY = "MSCONV_RECIPES"  # the user's own, looked at before those that come with msconv
MAX_BYTES = 64 << 10
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SHIPPED = Path(__file__).parent / "recipe_files"
NEWEST = "newest"

Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,99}/[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
FLAG = re.compile(r"[a-z][a-z0-9-]*")


class RecipeError(MsconvError):
    """A recipe that cannot be read, or that contradicts itself."""

    code = "recipe"
    exit_code = 2


def _check_targets(key: str, *names: str) -> None:
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"{key} {name[:80]!r}: no such target, known are {', '.join(TARGETS)}")


class Devices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` devices over `nodes` machines.  `memory_gib`: of each, as the driver reports it."""

    kind: str
    count: Count
    memory_gib: Count
    nodes: Count = 1

    def __post_init__(self) -> None:
        _check_targets("kind", self.kind)
        if device_of(self.kind).served_by:
            raise ValueError(f"kind {self.kind!r}: msconv serves on no such device")
        if self.count % self.nodes:
            raise ValueError(f"{self.count} devices do not divide over {self.nodes} nodes")


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that was really done: `what`, on which kind of device, on which day, with which versions."""

    what: str
    device: str
    when: datetime.date
    versions: dict[str, str]

    def __post_init__(self) -> None:
        _check_targets("device", self.device)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One deployment.  `name` and `path` are the file's.  The devices are sized for `requests` at a time of
    `context` tokens each.  `serve`: flags for the engine that serves,
    without their dashes."""

    name: str
    path: str
    model: str
    tp: Count
    dtype: ValueDtype
    targets: Annotated[list[str], msgspec.Meta(min_length=1)]
    devices: Devices
    context: Tokens
    requests: Count
    ep: Count = 1
    quant: Literal["", "w8a8"] = ""
    revision: str = NEWEST
    serve: dict[str, str | int | float | bool] = {}
    verified_on: list[Run] = []

    def __post_init__(self) -> None:
        _check_targets("targets", *self.targets)
        kind = self.devices.kind
        if not REPOSITORY.fullmatch(self.model):
            raise ValueError(f"model {self.model[:200]}: owner/name is needed")
        if not REVISION.fullmatch(self.revision):
            raise ValueError(f"revision {self.revision[:200]}: newest, a tag or a commit is needed")
        if self.tp % self.ep:
            raise ValueError(f"ep {self.ep} does not divide tp {self.tp}")
        if self.devices.count != self.tp:
            raise ValueError(f"devices.count {self.devices.count}: tp {self.tp} takes one device a rank")
        if kind not in self.targets:
            raise ValueError(f"targets {', '.join(self.targets)}: devices.kind {kind} is not among them")
        only = TARGETS[kind].only_dtype
        if only and self.dtype != only:
            raise ValueError(f"dtype {self.dtype}: {kind} computes in {only}")
        given_by = chosen_engine().set_elsewhere if self.serve else {}
        for flag in self.serve:
            if flag in given_by:
                raise ValueError(f"serve.{flag}: is given by {given_by[flag]}")
            if not FLAG.fullmatch(flag):
                raise ValueError(f"serve.{flag[:200]}: a flag's name without its dashes is needed")

    @property
    def source(self) -> str:
        """What to pull: `owner/name`, with `@revision` unless the newest will do."""
        return self.model if self.revision == NEWEST else f"{self.model}@{self.revision}"

    @property
    def device(self) -> Kind:
        return TARGETS[self.devices.kind].kind

    def defaults(self) -> dict[str, Any]:
        """What the recipe says, by the names that the commands' options have."""
        return {
            "tp": self.tp,
            "ep": self.ep,
            "dtype": self.dtype,
            "quant": self.quant or None,
            "targets": self.targets,
            "context": self.context,
            "batch": self.requests,
            "device_memory": self.devices.memory_gib << 30,
            "device": self.device,
            "nnodes": self.devices.nodes,
        }

    def serve_flags(self) -> dict[str, str]:
        """The engine's flags with their values; "" for one that takes none."""
        sized = chosen_engine().sized(self.context, self.requests)
        switched_on = {name: value for name, value in {**sized, **self.serve}.items() if value is not False}
        return {f"--{name}": "" if value is True else str(value) for name, value in switched_on.items()}


def all_recipes() -> dict[str, Path]:
    """Every recipe's file by name, in order; the user's own hide others of the same name.  Raises UsageError if
    MSCONV_RECIPES is no directory."""
    places = [SHIPPED]
    if own := os.environ.get(DIRECTORY):
        if not Path(own).is_dir():
            raise UsageError(f"{DIRECTORY}={own}: no such directory.", f"Correct or unset {DIRECTORY}.")
        places.append(Path(own))
    found = {path.stem: path for place in places for path in place.glob("*.yaml")}
    return {name: found[name] for name in sorted(found, key=_natural)}


def find_recipe(reference: str) -> Recipe | None:
    """Recipe of this name or in a `.yaml` file, None if there is none.  Raises RecipeError if it is wrong."""
    if reference.endswith((".yaml", ".yml")):
        return read_recipe(Path(reference))
    path = all_recipes().get(reference) if NAME.fullmatch(reference) else None
    return read_recipe(path) if path else None


def near_names(reference: str) -> list[str]:
    """Names of recipes that look like it, the nearest first."""
    names = {name.casefold(): name for name in all_recipes()}
    return [names[n] for n in difflib.get_close_matches(reference.casefold(), names, n=3)]


def read_recipe(path: Path) -> Recipe:
    """Read and check one file.  Raises RecipeError with the place in it: `tp: expected int, got str`."""
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else "no file can have this name"
        raise RecipeError(
            f"{str(path)[:300]}: cannot be read: {reason}.", "`msconv recipes` lists recipes."
        ) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(
            f"{path}: more than {MAX_BYTES} bytes: this is no recipe.", "`msconv recipes` lists them."
        )
    return parse_recipe(data, path)


def parse_recipe(data: bytes, path: Path) -> Recipe:
    """Check the text of a recipe whose file is `path`."""
    hint = "`msconv recipes NAME --json` shows one that is right."
    try:
        raw = yaml.load(data.decode("utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        where = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise RecipeError(f"{path}{where}: {e.problem or e.context}.", hint) from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: a date or a number that cannot be
        raise RecipeError(f"{path}: not YAML that can be read: {str(e).splitlines()[0]}.", hint) from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, such as `tp: 4`.", hint)
    try:
        for key in raw.keys() & {"name", "path"}:
            raise msgspec.ValidationError(f"Object contains unknown field `{key}`")
        return msgspec.convert({**raw, "name": path.stem, "path": str(path)}, Recipe)
    except msgspec.ValidationError as e:
        raise RecipeError(f"{path}: {_said(str(e))}.", hint) from None


def _said(message: str) -> str:
    """msgspec's words, the place first: "Expected `int`, got `str` - at `$.tp`" -> "tp: expected int, got str"."""
    text, _, place = message.partition(" - at ")
    place = place.strip("`").rpartition("`$")[2].removeprefix("$").removeprefix(".")
    text = text.replace("`", "")
    if text.startswith("Invalid enum value"):
        text += f", known are {', '.join(VALUE_DTYPES)}"
    if found := re.fullmatch(r"Object contains unknown field (.*)", text):
        place, text = f"{place}.{found[1]}".lstrip("."), "unknown key"
    elif found := re.fullmatch(r"Object missing required field (.*)", text):
        place, text = f"{place}.{found[1]}".lstrip("."), "is missing"
    return f"{place}: {text[:1].lower()}{text[1:]}" if place else text


def _natural(name: str) -> list[tuple[str, int]]:
    """4B before 32B."""
    return [(text.casefold(), int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain YAML: a key twice is an error, and so is an alias."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not used in recipes", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value}: this key is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made

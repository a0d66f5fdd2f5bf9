"""No string of others steers a terminal: manifests, configurations, names, as Hypothesis makes them."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from msconv.cli import cli, console, result
from msconv_runtime.artifact import Dropped, File, Manifest, Padding, Verified, read_manifest, write_manifest
from tests.checkpoints import edit_json
from tests.conftest import Checkpoints

OURS = re.compile(r"\x1b\[(?:0|1|31|32|33)m")  # colours of states and of "Error:"; none of EVIL is like them
EVIL = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x1b\\",
    "\x1bc",
    "\x1b[?1049h",
    "\x9b2J",
    "\x90q\x9c",
    "\x07",
    "\x08\x08",
    "\r",
    "\x7f",
    "\x00",
    "\u202e",
    "\u2028",
    "\u200b",
    "\ufeff",
    "\U000e0001",
    "\nNext: rm -rf /",
    "\nError: all is well",
    "\n\x1b[5mok",
    "%s{0}\t",
]
STRINGS = st.lists(st.one_of(st.sampled_from(EVIL), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)))
TEXTS = STRINGS.map("".join).filter(lambda text: any(evil in text for evil in EVIL))
FILE_NAMES = TEXTS.map(lambda text: text.replace("/", "|").replace("\0", "\x01")[:60])
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a terminal: else click takes escapes out, whoever wrote them."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for module in (console, result):
        monkeypatch.setattr(module, "colour", lambda: True)


def said(*args: object) -> str:
    """All that a command prints, in this process: what `msconv ARGS` prints on a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main(list(map(str, args)), prog_name="msconv", standalone_mode=False, color=True)
        except click.exceptions.Exit:
            pass
        except Exception as e:
            result.report(e)
    return out.getvalue() + err.getvalue()


def check_plain(text: str, *args: object) -> None:
    plain = OURS.sub("", text)
    raw = {c for c in plain if c != "\n" and not c.isprintable()}
    assert not raw, (args, raw, plain)
    assert not re.search(r"^(Next: rm|Error: all is well)", plain, re.M), (args, plain)
    assert "Traceback" not in plain, (args, plain)
    assert "fault in msconv" not in plain, (args, plain)


def test_what_is_looked_for_would_be_found() -> None:
    for evil in EVIL:
        with pytest.raises(AssertionError):
            check_plain(f"artifact: {evil}\n" if evil != EVIL[-1] else "\t")


# Artifacts

Poison = Callable[[Manifest, str], Manifest]


def of_weights(**made: Callable[[Any, str], Any]) -> Poison:
    return lambda m, text: replace(
        m, weights=replace(m.weights, **{name: make(m.weights, text) for name, make in made.items()})
    )


def of_graphs(field: str) -> Poison:
    return lambda m, text: replace(m, graphs=[replace(g, **{field: getattr(g, field) + text}) for g in m.graphs])


def proof(m: Manifest, text: str) -> Manifest:
    assert m.weights is not None
    graphs = [g.digest for g in m.graphs if g.target == "cpu"]
    return replace(
        m,
        verified=[
            Verified(
                target="cpu",
                weights_digest=m.weights.digest,
                graph_digests=graphs,
                reference=text,
                mode=text,
                bound=1e-4,
                max_abs_logit_error=1e-6,
                argmax_agreement=1.0,
                ranks=1,
                logits_compared=1,
                settings={text: text},
                norms={text: 1e-9},
            )
        ],
    )


POISONS: dict[str, Poison] = {
    "tool": lambda m, text: replace(m, tool=text),
    "source": lambda m, text: replace(m, model=replace(m.model, source=text)),
    "family": lambda m, text: replace(m, model=replace(m.model, family=text)),
    "commit": lambda m, text: replace(m, model=replace(m.model, commit=text)),
    "configuration": lambda m, text: replace(m, model=replace(m.model, config_digest=text)),
    "element type": of_weights(source_dtype=lambda w, text: text),
    "digest": of_weights(digest=lambda w, text: text),
    "tensors": of_weights(tensors=lambda w, text: [replace(t, name=t.name + text) for t in w.tensors]),
    "one tensor twice": of_weights(tensors=lambda w, text: [replace(t, name=text) for t in w.tensors]),
    "tensor types": of_weights(tensors=lambda w, text: [replace(t, dtype=text) for t in w.tensors]),
    "dropped": of_weights(dropped=lambda w, text: [Dropped(text, 1, text)]),
    "padded": of_weights(padded=lambda w, text: [Padding(text, 1, 2)]),
    "weight files": of_weights(files=lambda w, text: [replace(f, path=f.path + text) for f in w.files]),
    "graph paths": of_graphs("path"),
    "graph targets": of_graphs("target"),
    "graph roles": of_graphs("role"),
    "graph variants": of_graphs("variant"),
    "graph digests": of_graphs("digest"),
    "MindSpore": of_graphs("mindspore"),
    "files": lambda m, text: replace(m, files=[*m.files, File(f"{text}.json", 1, text)]),
    "proof": proof,
}
COMMANDS: list[tuple[str, ...]] = [
    ("inspect",),
    ("inspect", "--json"),
    ("doctor",),
    ("serve", "--print-command"),
    ("report", "--json"),
]


def check_poisoned(root: Path, manifest: Manifest, poisons: list[str], text: str) -> None:
    for poison in poisons:
        manifest = POISONS[poison](manifest, text)
    write_manifest(root, manifest)
    for name, *options in COMMANDS:
        check_plain(said(name, root, *options), name, *options)


@pytest.mark.parametrize("poison", POISONS)
def test_a_manifest_cannot_steer_a_terminal(own_artifact: Path, poison: str) -> None:
    check_poisoned(own_artifact, read_manifest(own_artifact), [poison], "".join(EVIL))


@pytest.mark.slow
def test_no_manifest_can(own_artifact: Path) -> None:
    manifest = read_manifest(own_artifact)

    @FUZZ
    @given(st.lists(st.sampled_from(list(POISONS)), min_size=1, max_size=3, unique=True), TEXTS)
    def poisoned(poisons: list[str], text: str) -> None:
        check_poisoned(own_artifact, manifest, poisons, text)

    poisoned()


@pytest.mark.slow
@settings(FUZZ, max_examples=15)
@given(FILE_NAMES, FILE_NAMES)
def test_names_of_files_cannot(
    compiled: Path, tmp_path_factory: pytest.TempPathFactory, name: str, root: str
) -> None:
    place = tmp_path_factory.mktemp("names") / f"a{root}"
    shutil.copytree(compiled, place)
    (place / f"{name}.json").write_text("{}")
    (place / f"{name}.md").write_text("")
    for command, *options in [*COMMANDS, ("inspect", "--check"), ("sign", "--key", place / f"{name}.md")]:
        check_plain(said(command, place, *options), command, *options)
    check_plain(said("inspect", place, "--require-signature", place / name))
    shutil.rmtree(place)


# Checkpoints


def rename_tensors(model: Path, text: str, whole: bool) -> None:
    """Put text into the names of all tensors, or in place of one."""
    path = model / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    names = list(header)
    renamed = {(text if name == names[-1] else name) if whole else name + text: header[name] for name in names}
    head = json.dumps(renamed).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])


def configurations(text: str) -> Iterator[dict[str, Any]]:
    yield {"architectures": [text]}
    yield {"model_type": text}
    yield {"dtype": text}
    yield {"hidden_act": text}
    yield {text: 1}
    yield {"hidden_size": text}
    yield {"rope_parameters": {"rope_type": text, text: text}}
    yield {"layer_types": [text] * 4}
    yield {"quantization_config": {"quant_method": text, "fmt": text}}
    yield {"auto_map": {"AutoModel": text}}


@pytest.mark.slow
@settings(FUZZ, max_examples=10)
@given(TEXTS, FILE_NAMES)
def test_a_checkpoint_cannot(
    checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory, text: str, name: str
) -> None:
    place = tmp_path_factory.mktemp("models")
    model = Path(shutil.copytree(checkpoint("untied"), place / f"m{name}"))
    config = (model / "config.json").read_text()
    lines: list[tuple[object, ...]] = [
        ("plan", "--model", model, "--tp", 2),
        ("plan", "--model", model, "--tp", 3),
        ("convert", "--model", model, "--tp", 1, "--dry-run"),
    ]
    for line in (*lines, ("plan", "--model", text.replace("\0", ""), "--tp", 1), ("inspect", model)):
        check_plain(said(*line), *line)
    for change in configurations(text):
        edit_json(model / "config.json", **change)
        check_plain(said(*lines[0]), change)
        (model / "config.json").write_text(config)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": text}))
    (model / f"{name}.gguf").write_text("")
    check_plain(said(*lines[2]), "tokenizer")
    for whole in (False, True):
        rename_tensors(model, text, whole)
        for line in lines:
            check_plain(said(*line), *line)
    shutil.rmtree(place)

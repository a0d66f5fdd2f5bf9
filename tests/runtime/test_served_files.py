"""Files that a server reads besides weights and graphs: each has a digest, and none is there that has not."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from msconv.steps.reshard import prepare as prepare_reshard
from msconv_runtime.artifact import Artifact, File, digest_bytes, read_manifest, write_manifest
from msconv_runtime.artifact.consistency import contradiction
from msconv_runtime.artifact.integrity import check_artifact
from msconv_runtime.artifact.served import other_files, refuse_wrong_files
from msconv_runtime.errors import ArtifactError
from tests.commands import run_msconv
from tests.conftest import Checkpoints
from tests.conversions import convert
from tests.warm import run_warm

NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json")


@pytest.fixture(scope="module")
def served(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with everything that a model for chats has."""
    directory = tmp_path_factory.mktemp("served")
    model = Path(shutil.copytree(checkpoint("untied"), directory / "model"))
    for name in NAMES[:4]:
        (model / name).write_text('{"of": "the model"}')
    convert(model, directory / "out")
    return directory / "out"


@pytest.fixture
def own(served: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served, tmp_path / "own"))


def test_each_file_is_recorded_by_what_it_is(served: Path) -> None:
    files = {f.name: f for f in read_manifest(served).files}
    assert set(files) == set(NAMES)
    for name, file in files.items():
        data = (served / name).read_bytes()
        assert (file.size, file.digest) == (len(data), digest_bytes(data))
    assert check_artifact(Artifact(served)) == []
    assert other_files(Artifact(served)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["changed", "longer", "gone"])
def test_a_file_that_is_another_is_named(own: Path, name: str, what: str) -> None:
    path = own / name
    data = path.read_bytes()
    path.unlink()
    if what != "gone":
        path.write_bytes(data[:-1] + b" " if what == "changed" else data + b" ")
    (damage,) = check_artifact(Artifact(own))
    assert damage.path == name
    with pytest.raises(ArtifactError, match=name):
        refuse_wrong_files(Artifact(own))
    with pytest.raises(ArtifactError, match=name):
        prepare_reshard(own, 2)


@pytest.mark.parametrize(
    "name",
    ["added_tokens.json", "modeling_evil.py", "model.safetensors", "pytorch_model.BIN", "merges.txt",
     "additional_chat_templates/evil.jinja", "graphs/cpu/evil.so"],
)  # fmt: skip
def test_a_file_that_nobody_vouches_for_is_refused_if_a_server_would_read_it(own: Path, name: str) -> None:
    (own / name).parent.mkdir(parents=True, exist_ok=True)
    (own / name).write_bytes(b"{}")
    (damage,) = check_artifact(Artifact(own))
    assert (damage.path, damage.problem) == (name, "is not in the manifest, and a server would read it")


def test_notes_of_ones_own_are_named_and_do_no_harm(own: Path) -> None:
    (own / "notes.md").write_text("mine")
    done = run_msconv("inspect", own, "--check")
    assert done.code == 0, done.stderr
    assert "not of the artifact: notes.md" in done.stdout
    assert "files: config.json, generation_config.json, tokenizer.json" in done.stdout


def test_of_before_files_had_digests_it_says_so(own: Path) -> None:
    write_manifest(own, msgspec.structs.replace(read_manifest(own), files=[]))
    (own / "tokenizer.json").write_text("{}")
    done = run_msconv("inspect", own, "--check")
    assert done.code == 0, done.stderr
    assert "made before files had digests; of those beside, only config.json is vouched for" in done.stdout


@pytest.mark.parametrize("of_before", [False, True], ids=["listed", "of before files had digests"])
@pytest.mark.parametrize("key", ["rope_parameters", "rms_norm_eps", "num_hidden_layers"])
def test_an_edited_configuration_is_refused_by_doctor_and_inspect(own: Path, key: str, of_before: bool) -> None:
    """Whether the manifest's list vouches for another config.json, or has none: graphs were made from one."""
    path = own / "config.json"
    text = path.read_text()
    path.write_text(text.replace(f'"{key}"', f'"x{key[1:]}"'))  # of the same size
    assert path.read_text() != text
    manifest = read_manifest(own)
    digests = {path.name: digest_bytes(path.read_bytes())}
    forged = [msgspec.structs.replace(f, digest=digests.get(f.name, f.digest)) for f in manifest.files]
    write_manifest(own, msgspec.structs.replace(manifest, files=[] if of_before else forged))
    words = "config.json: is not the configuration this artifact was made from"
    checked = run_msconv("inspect", own, "--check", "--json")
    assert checked.code == 1
    assert [d["path"] for d in checked.json["check"]["damage"]] == ["config.json"]
    for line in (("inspect", own), ("inspect", own, "--check")):
        done = run_msconv(*line)
        assert done.code == 1
        assert words in done.stderr
    done = run_msconv("doctor", own)
    assert done.code == 4
    assert words in done.stdout
    assert "cannot    serve on a CPU" in done.stdout
    assert "Traceback" not in done.stderr


def test_what_is_served_is_checked_by_serve_and_doctor(own: Path) -> None:
    assert run_warm("compile", own, "--target", "cpu").code == 0
    (own / "chat_template.jinja").write_text("{{ evil }}")
    done = run_msconv("serve", own, "--print-command")
    assert done.code == 1
    assert "chat_template.jinja: " in done.stderr
    done = run_msconv("doctor", own)
    assert done.code == 4
    assert "chat_template.jinja: digest differs" in done.stdout or "chat_template.jinja: has" in done.stdout


def test_a_new_layout_has_the_same_files(served: Path, tmp_path: Path) -> None:
    done = run_msconv("reshard", served, "--tp", 2, "--output", tmp_path / "tp2")
    assert done.code == 0, done.stderr
    assert read_manifest(tmp_path / "tp2").files == read_manifest(served).files


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/b.json", "msconv.json", "evil.py", ".x.json", "x.json\n", "", "READY"]
)
def test_a_manifest_names_no_other_files(served: Path, name: str) -> None:
    manifest = msgspec.structs.replace(read_manifest(served), files=[File(name, 1, "xxh3:0")])
    assert "is none that a model has" in contradiction(manifest)

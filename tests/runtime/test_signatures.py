"""Signed artifacts: whatever is not as it was signed is refused before it is read, and named."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from msconv.share.parts import signed_names
from msconv_runtime import signatures
from msconv_runtime.artifact import MANIFEST, READY, SIGNATURE, Artifact, digest_bytes, read_manifest
from msconv_runtime.errors import ArtifactError, EnvironmentProblem, UsageError
from msconv_runtime.serving import loading, signed
from msconv_runtime.serving.settings import REQUIRE_SIGNATURE
from tests.cli.interface import fields
from tests.cli.test_interface import frozen_fields
from tests.commands import run_msconv, run_python
from tests.signing import Keys, make_keys
from tests.warm import run_warm

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def whole(compiled: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed artifact.  To be read, never changed."""
    root = Path(shutil.copytree(compiled, tmp_path_factory.mktemp("signed") / "artifact"))
    signatures.sign(root, signed_names(root, read_manifest(root)), keys.private)
    return root


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "own", symlinks=True))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def weights(root: Path) -> Path:
    return next((root / "weights").glob("*.safetensors"))


def other_manifest(root: Path) -> None:
    """Another manifest that READY vouches for: what anybody could write."""
    data = (root / MANIFEST).read_bytes() + b" "
    (root / MANIFEST).write_bytes(data)
    (root / READY).write_text(f"{digest_bytes(data)}\n")


def linked(root: Path) -> None:
    path = weights(root)
    path.rename(root.parent / "elsewhere")
    path.symlink_to(root.parent / "elsewhere")


def hidden_beside_the_card(root: Path) -> None:
    (root / "README.md").unlink(missing_ok=True)
    (root / "README.md").mkdir()
    (root / "README.md" / "modeling_evil.py").write_text("")


def resigned(change: Callable[[dict[str, object]], object]) -> Change:
    """The signature's own statement changed, with the old signature over it."""

    def apply(root: Path) -> None:
        bundle = json.loads((root / SIGNATURE).read_text())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        change(statement)
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
        (root / SIGNATURE).write_text(json.dumps(bundle))

    return apply


CHANGES: dict[str, tuple[Change, str]] = {
    "a weight": (lambda r: flip(weights(r)), "safetensors: other bytes"),
    "a graph": (lambda r: flip(next(r.glob("graphs/cpu/*.mindir"))), "mindir: other bytes"),
    "the configuration": (lambda r: (r / "config.json").write_text("{}"), "config.json: other bytes"),
    "the manifest": (other_manifest, "msconv.json: other bytes"),
    "the tokenizer": (lambda r: flip(r / "tokenizer.json"), "tokenizer.json: other bytes"),
    "a graph that is gone": (lambda r: (r / "graphs/cpu/decode.mindir").unlink(), "decode.mindir: is not there"),
    "weights that are gone": (lambda r: weights(r).unlink(), "safetensors: is not there"),
    "a file more": (lambda r: (r / "notes.md").write_text(""), "notes.md: was not signed"),
    "a hidden file more": (lambda r: (r / "weights" / ".x").write_text(""), "weights/.x: was not signed"),
    "a file in a directory named as the card": (hidden_beside_the_card, "modeling_evil.py: was not signed"),
    "a link": (linked, "symlink"),
    "a linked directory": (lambda r: (r / "more").symlink_to("/tmp"), "symlink"),
    "no signature": (lambda r: (r / SIGNATURE).unlink(), "is not signed (no model.sig)"),
    "an empty signature": (lambda r: (r / SIGNATURE).write_text(""), "by no key that it names"),
    "a signature that is none": (lambda r: (r / SIGNATURE).write_text("[" * 100_000), "by no key that it names"),
    "a signature of nothing": (lambda r: (r / SIGNATURE).write_text("{}"), "by no key that it names"),
    "a pipe for a signature": (
        lambda r: ((r / SIGNATURE).unlink(), os.mkfifo(r / SIGNATURE)),
        "is no regular file",
    ),
    "a statement without files": (
        resigned(lambda s: s["predicate"].update(resources=[])),  # type: ignore[attr-defined]
        "was changed after it was signed",
    ),
    "a statement that leaves files out": (
        resigned(lambda s: s["predicate"]["serialization"].update(ignore_paths=["weights"])),  # type: ignore[index]
        "was changed after it was signed",
    ),
}


def test_what_was_signed_is_accepted(whole: Path, keys: Keys) -> None:
    signatures.refuse_unsigned(whole, keys.public)
    assert (signatures.described(whole) or {})["stale"] is False


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_not_as_it_was_signed_is_named(own: Path, keys: Keys, what: str) -> None:
    change, words = CHANGES[what]
    change(own)
    with pytest.raises(ArtifactError) as refused:
        signatures.refuse_unsigned(own, keys.public)
    assert words in refused.value.message
    assert refused.value.hint


def test_another_key_is_refused_by_its_digest(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"is signed by another key than .*other.pub: its SHA-256 is [0-9a-f]{64}"
    ):
        signatures.refuse_unsigned(whole, make_keys(tmp_path, "other").public)


def test_a_signature_by_another_key_that_names_the_right_one_is_refused(
    own: Path, keys: Keys, tmp_path: Path
) -> None:
    right = json.loads((own / SIGNATURE).read_text())["verificationMaterial"]
    signatures.sign(own, signed_names(own, read_manifest(own)), make_keys(tmp_path, "other").private)
    bundle = json.loads((own / SIGNATURE).read_text())
    (own / SIGNATURE).write_text(json.dumps({**bundle, "verificationMaterial": right}))
    with pytest.raises(ArtifactError, match="was changed after it was signed, or is not by"):
        signatures.refuse_unsigned(own, keys.public)


def test_what_msconv_writes_on_the_receiving_side_does_not_matter(own: Path, keys: Keys) -> None:
    (own / "report.html").write_text("mine")
    (own / "README.md").write_text("the hub's")
    (own / ".msconv").mkdir(exist_ok=True)
    (own / ".msconv" / "pulled").write_text("")
    signatures.refuse_unsigned(own, keys.public)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_other_curves(own: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    keys = make_keys(tmp_path, "other", curve)
    signatures.sign(own, signed_names(own, read_manifest(own)), keys.private)
    signatures.refuse_unsigned(own, keys.public)


def test_keys_that_are_none_are_refused(own: Path, keys: Keys, tmp_path: Path) -> None:
    made = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa").write_bytes(
        made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    (tmp_path / "rsa.pub").write_bytes(
        made.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "none").write_text("no key")
    names = signed_names(own, read_manifest(own))
    for path in (tmp_path / "rsa", tmp_path / "none", tmp_path / "missing", tmp_path, keys.public):
        with pytest.raises(UsageError, match="is no private elliptic-curve key"):
            signatures.sign(own, names, path)
    for path in (tmp_path / "rsa.pub", tmp_path / "none", tmp_path / "missing", tmp_path, keys.private):
        with pytest.raises(UsageError, match="is no public elliptic-curve key"):
            signatures.refuse_unsigned(own, path)


def test_the_ecosystems_own_program_agrees(own: Path, keys: Keys) -> None:
    (own / "report.html").write_text("mine")
    options = ["--signature", own / SIGNATURE, "--public_key", keys.public]
    command = [sys.executable, "-m", "model_signing", "verify", "key", own, *options]
    assert subprocess.run(command, capture_output=True).returncode == 0
    flip(own / "config.json")
    assert subprocess.run(command, capture_output=True).returncode != 0


WITHOUT = """
import sys
sys.modules["model_signing"] = None
from msconv.cli import main
main()
"""


@pytest.mark.parametrize("command", ["inspect", "serve"])
def test_without_the_package_one_line_says_which_extra(whole: Path, keys: Keys, command: str) -> None:
    done = run_python(WITHOUT, command, whole, "--require-signature", keys.public)
    assert done.code == 4
    assert "Signatures need the package model-signing" in done.stderr
    assert "pip install 'msconv[sign]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_python(WITHOUT, "sign", whole, "--key", keys.private).code == 4


# On the command line


def test_a_local_artifact_is_signed_shown_and_checked(own: Path, keys: Keys) -> None:
    (own / SIGNATURE).unlink()
    assert json.loads(run_msconv("inspect", own, "--json").stdout)["signature"] is None
    (own / "notes.md").write_text("mine")
    done = run_msconv("sign", own, "--key", keys.private, "--json")
    assert done.code == 0, done.stderr
    assert fields(done.json) == frozen_fields()["msconv sign"]
    assert "Not signed, and here a check refuses them: notes.md" in done.stderr
    (own / "notes.md").unlink()
    assert f"signature: by the key {done.json['key'][:16]}, not checked here" in run_msconv("inspect", own).stdout
    shown = run_msconv("inspect", own, "--require-signature", keys.public, "--json")
    assert shown.code == 0, shown.stderr
    assert fields(shown.json) == frozen_fields()["msconv inspect --require-signature"]
    assert f"Every byte is as the owner of {keys.public} signed it." in shown.stderr
    flip(weights(own))
    done = run_msconv("inspect", own, "--require-signature", keys.public)
    assert done.code == 1
    assert "other bytes" in done.stderr
    assert not done.stdout


def test_serve_refuses_before_the_manifest_is_read(own: Path, keys: Keys, tmp_path: Path) -> None:
    shown = run_msconv("serve", own, "--require-signature", keys.public, "--print-command", "--json")
    assert shown.code == 0, shown.stderr
    assert shown.json["environment"][REQUIRE_SIGNATURE] == str(keys.public)
    other = make_keys(tmp_path, "other").public
    assert run_msconv("serve", own, "--require-signature", other, "--print-command").code == 1
    (own / MANIFEST).write_text("not even JSON")
    done = run_msconv("serve", own, "--require-signature", keys.public)
    assert done.code == 1
    assert "msconv.json: other bytes" in done.stderr
    assert "`msconv sign ARTIFACT --key KEY` signs it" in done.stderr


def test_a_variable_asks_for_it_too(own: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE_SIGNATURE, str(keys.public))
    shown = run_msconv("serve", own, "--print-command", "--json")
    assert shown.json["environment"][REQUIRE_SIGNATURE] == str(keys.public)
    flip(own / "config.json")
    assert run_msconv("serve", own, "--print-command").code == 1


def test_what_changes_an_artifact_says_that_its_signature_is_stale(own: Path, keys: Keys) -> None:
    done = run_warm("compile", own, "--target", "ascend910b")
    assert done.code == 0, done.stderr
    assert f"model.sig is for the artifact as it was: `msconv sign {own} --key KEY` signs it again" in done.stderr
    assert ", of before the artifact was changed" in run_msconv("inspect", own).stdout
    done = run_msconv("inspect", own, "--require-signature", keys.public)
    assert done.code == 1
    assert "msconv.json: other bytes" in done.stderr
    assert "graphs/ascend910b/prefill.mindir: was not signed" in done.stderr
    assert run_msconv("sign", own, "--key", keys.private).code == 0
    assert run_msconv("inspect", own, "--require-signature", keys.public).code == 0


# Where a server loads


def test_the_slot_checks_once_and_before_it_loads(
    own: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    monkeypatch.setenv(REQUIRE_SIGNATURE, str(keys.public))
    monkeypatch.setenv(signed.CHECKED, "of something else")
    real = signed.refuse_unsigned
    monkeypatch.setattr(signed, "refuse_unsigned", lambda root, key: (reads.append(root), real(root, key)))
    signed.refuse_unsigned_once(own)
    signed.refuse_unsigned_once(own)
    assert reads == [own]
    monkeypatch.setenv(signed.CHECKED, "")
    checked = (own / SIGNATURE).read_bytes()
    monkeypatch.setattr(
        signed, "refuse_unsigned", lambda root, key: (root / SIGNATURE).write_bytes(checked + b" ")
    )
    signed.refuse_unsigned_once(own)  # another signature comes while the one that was there is checked
    monkeypatch.setattr(signed, "refuse_unsigned", lambda root, key: reads.append(root))
    signed.refuse_unsigned_once(own)
    assert reads == [own, own]
    monkeypatch.setattr(signed, "refuse_unsigned", real)
    flip(own / SIGNATURE, 40)
    monkeypatch.setattr(loading, "Graphs", None)  # would be called after it
    with pytest.raises(ArtifactError):
        loading.load(Artifact(own), None)  # type: ignore[arg-type]
    (own / SIGNATURE).unlink()
    with pytest.raises(ArtifactError, match="is not signed"):
        signed.refuse_unsigned_once(own)
    monkeypatch.setenv(REQUIRE_SIGNATURE, str(tmp_path / "gone.pub"))
    with pytest.raises(UsageError):
        signed.refuse_unsigned_once(own)


def test_sglang_checks_before_it_reads_the_configuration(
    own: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msconv_runtime.sglang import starting

    monkeypatch.setenv(REQUIRE_SIGNATURE, str(keys.public))
    monkeypatch.setenv(signed.CHECKED, "")
    flip(own / "config.json")
    with pytest.raises(ArtifactError, match=r"config\.json: other bytes"):
        starting.get_config(lambda *_: pytest.fail("was read"), str(own))


def test_missing_packages_are_named_where_a_server_loads(
    own: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REQUIRE_SIGNATURE, str(keys.public))
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(EnvironmentProblem, match="model-signing"):
        signed.refuse_unsigned_once(own)

"""`msconv sign`: a signature over an artifact as it is."""

from __future__ import annotations

from pathlib import Path

import click

from msconv_runtime import signatures
from msconv_runtime.artifact import SIGNATURE, Artifact, Manifest
from msconv_runtime.artifact.served import other_files
from msconv_runtime.errors import ArtifactError

from .command import Command
from .console import find_artifact, say, step
from .options import artifact_argument
from .result import Result, json_option, show


@click.command("sign", cls=Command)
@artifact_argument
@click.option(
    "--key",
    required=True,
    metavar="KEY",
    type=click.Path(path_type=Path),
    help="Private key: an elliptic curve's (P-256, P-384, P-521), in PEM, without a password.",
)
@json_option
def command(artifact: Path | None, key: Path) -> None:
    """Sign an artifact as it is, into model.sig: after all that changes it.

    pull, serve and inspect compare every byte with it, given the public key as --require-signature.  compile,
    verify and rehearse change the manifest: sign again after them.  Signatures are those of OpenSSF Model Signing.

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out me.pem && openssl ec -in me.pem -pubout -out me.pub
    msconv sign artifacts/Qwen3-8B-tp4 --key me.pem
    """
    root = find_artifact(artifact)
    sign(root, Artifact(root).manifest, key)
    found = signatures.described(root)
    assert found is not None
    check = f"msconv inspect {root} --require-signature PUBKEY"
    data = {"artifact": str(root), "signature": str(root / SIGNATURE), "key": found["key"]}
    show(Result(data, lines=[f"Signed: {root / SIGNATURE}, by the key {found['key'][:16]}"], next=check))


def sign(root: Path, manifest: Manifest, key: Path) -> None:
    """Sign, and say what is there and is not of the artifact.  Raises MsconvError."""
    from ..share.parts import signed_names
    from ..workspace.lock import exclusive

    with exclusive(root), step(f"signing {root}"):
        signatures.sign(root, signed_names(root, manifest), key)
    if others := other_files(Artifact(root, manifest)):
        say(f"Not signed, and here a check refuses them: {', '.join(others)}")


def signed_line(key: Path | None) -> list[str]:
    """What a command says after `key` was asked for, and nothing was refused."""
    return [] if key is None else [f"Every byte is as the owner of {key} signed it."]


def refuse_stale(root: Path) -> None:
    """Raises ArtifactError if the signature that lies there is for another manifest: who checks it, refuses it."""
    if stale(root):
        raise ArtifactError(
            f"{root}: was compiled, verified or rehearsed since it was signed; nothing was uploaded.",
            f"Sign it again with --sign KEY, or delete {root / SIGNATURE}.",
        )


def stale(root: Path) -> bool:
    found = signatures.described(root)
    return found is not None and bool(found["stale"])

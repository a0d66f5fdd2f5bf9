"""`msconv push`: an artifact goes to a hub."""

from __future__ import annotations

from pathlib import Path

import click

from msconv_runtime.artifact import Artifact
from msconv_runtime.units import human_bytes

from ..checkpoint.client import require_client
from .command import Command
from .console import byte_progress, find_artifact
from .options import artifact_argument
from .result import Result, json_option, show
from .sign import refuse_stale, sign


@click.command("push", cls=Command)
@artifact_argument
@click.option("--to", required=True, metavar="OWNER/NAME", help="Repository, created if it is not there.")
@click.option("--revision", metavar="BRANCH", help="Branch, created if it is not there.  [default: main]")
@click.option("--private", is_flag=True, help="If the repository is created: only for those who may see it.")
@click.option("--check", is_flag=True, help="First read every byte and compare digests.")
@click.option(
    "--sign",
    "key",
    metavar="KEY",
    type=click.Path(path_type=Path),
    help="First sign it with this private key: an elliptic curve's, in PEM.",
)
@json_option
def command(
    artifact: Path | None, to: str, revision: str | None, private: bool, check: bool, key: Path | None
) -> None:
    """Upload an artifact to a repository of a Hugging Face hub, with a card that says what it is.

    Run again after an interruption: what is there already is not uploaded again.  Only the last commit has READY,
    so that half of an artifact is never taken for a whole one.  HF_TOKEN must allow to write.

    \b
    msconv push artifacts/Qwen3-8B-tp4 --to me/Qwen3-8B-tp4
    msconv push artifacts/Qwen3-8B-tp4 --to me/Qwen3-8B-tp4 --private --check
    msconv push artifacts/Qwen3-8B-tp4 --to me/Qwen3-8B-tp4 --sign me.pem
    """
    require_client("msconv push")
    from ..share import parts
    from ..share.push import push, target

    name = target(to)
    root = find_artifact(artifact)
    opened = Artifact(root)
    manifest = opened.manifest
    weights = parts.weight_bytes(manifest)
    with byte_progress("checking", weights if check else 0) as advance:
        parts.check(opened, "Convert or compile again; nothing was uploaded.", check, advance)
    if key is not None:
        sign(root, manifest, key)
    refuse_stale(root)
    with byte_progress("uploading", weights) as advance:
        done = push(root, manifest, name, revision or "", private, advance)
    verb = "Pushed" if done.bytes_uploaded else "Already there"
    summary = (
        f"{verb}: {done.artifact} to {name}, commit {done.commit[:12]}, {done.files} files, "
        f"uploaded {human_bytes(done.bytes_uploaded)} in {done.seconds:.1f} s"
    )
    card = [f"{parts.CARD} of {name} was not written by msconv and was left as it is."] * done.kept_card
    show(
        Result(
            {
                "artifact": str(done.artifact),
                "repository": done.repository,
                "commit": done.commit,
                "bytes_uploaded": done.bytes_uploaded,
                "files": done.files,
                "seconds": round(done.seconds, 3),
            },
            lines=[*card, summary],
            next=f"msconv pull {name}{'@' + revision if revision else ''}",
        )
    )

"""Signed artifacts on a hub: what is not as its author signed it does not become an artifact here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from msconv_runtime.artifact import MANIFEST, READY, SIGNATURE, read_manifest, write_manifest
from tests.commands import run_msconv
from tests.hub.server import Hub
from tests.hub.test_share import NAME, done, own, push, share
from tests.signing import Keys, make_keys
from tests.warm import run_warm

pytestmark = pytest.mark.slow
__all__ = ["own", "share"]  # fixtures
OUT = Path("artifacts/Qwen3-8B-tp4")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


def test_what_was_signed_is_pulled_and_what_anybody_changed_is_not(
    share: Hub, own: Path, keys: Keys, tmp_path: Path
) -> None:
    done(push(own, "--sign", keys.private))
    assert SIGNATURE in share.repos[NAME].files()
    said = done(run_msconv("pull", NAME, "--require-signature", keys.public)).stderr
    assert f"Every byte is as the owner of {keys.public} signed it." in said
    done(run_msconv("inspect", OUT, "--require-signature", keys.public))
    done(run_msconv("pull", NAME))  # again, without asking

    other = make_keys(tmp_path, "other")
    refused = run_msconv("pull", NAME, "--require-signature", other.public, "--output", tmp_path / "b")
    assert refused.code == 1
    assert "is signed by another key than" in refused.stderr
    assert not (tmp_path / "b").exists()

    name = "generation_config.json"
    (OUT / name).write_text('{"temperature": 9}')
    refused = run_msconv("inspect", OUT, "--require-signature", keys.public)
    assert f"{name}: other bytes" in refused.stderr
    done(run_msconv("pull", NAME, "--require-signature", keys.public))  # mends it
    assert (OUT / name).read_text() == "{}"


def test_an_artifact_of_somebody_else_under_the_same_signature_is_refused(
    share: Hub, own: Path, keys: Keys, tmp_path: Path
) -> None:
    """A repository taken over: other files, which agree with their own manifest, and the old signature."""
    done(push(own, "--sign", keys.private))
    signature = (own / SIGNATURE).read_bytes()
    taken = tmp_path / "taken"
    done(run_msconv("reshard", own, "--tp", 2, "--output", taken))
    (taken / SIGNATURE).write_bytes(signature)
    refused = push(taken)
    assert refused.code == 1
    assert "was compiled, verified or rehearsed since it was signed; nothing was uploaded" in refused.stderr
    (taken / SIGNATURE).unlink()
    done(push(taken))
    assert SIGNATURE not in share.repos[NAME].files()  # the old one is gone with what it was for
    refused = run_msconv("pull", NAME, "--require-signature", keys.public)
    assert refused.code == 1
    assert "is not signed (no model.sig)" in refused.stderr
    assert not OUT.exists()
    (share.repos[NAME].directory / SIGNATURE).write_bytes(signature)
    refused = run_msconv("pull", NAME, "--require-signature", keys.public)
    assert refused.code == 1
    assert "model.sig was made for another msconv.json" in refused.stderr
    assert not OUT.exists()


def test_what_only_the_signature_defends_leaves_no_artifact(share: Hub, own: Path, keys: Keys) -> None:
    """An artifact of before files had digests: its manifest says nothing of the tokenizer."""
    write_manifest(own, msgspec.structs.replace(read_manifest(own), files=[]))
    done(push(own, "--sign", keys.private))
    (share.repos[NAME].directory / "tokenizer.json").write_text('{"version": "2.0"}')
    refused = run_msconv("pull", NAME, "--require-signature", keys.public)
    assert refused.code == 1
    assert "tokenizer.json: other bytes" in refused.stderr
    assert not (OUT / READY).exists()
    assert not (OUT / MANIFEST).exists()
    assert done(run_msconv("pull", NAME)).code == 0  # nobody asked


def test_a_pushed_signature_that_is_stale_is_refused(share: Hub, own: Path, keys: Keys) -> None:
    done(run_msconv("sign", own, "--key", keys.private))
    done(run_warm("compile", own, "--target", "ascend910b"))
    refused = push(own)
    assert refused.code == 1
    assert "Sign it again with --sign KEY" in refused.stderr
    done(push(own, "--sign", keys.private))
    done(run_msconv("pull", NAME, "--require-signature", keys.public))

"""A server that only prefills or only decodes: its flags, what is refused, and whose keys and values it takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from msconv_runtime.artifact import read_manifest, write_manifest
from msconv_runtime.errors import EnvironmentProblem, UsageError
from msconv_runtime.serving.halves import Half, Mode, chosen_half
from msconv_runtime.serving.launch import Launch, plan_launch
from msconv_runtime.sglang import halves, transfer
from tests.commands import run_msconv


def launch(artifact: Path, mode: Mode, *extra: str, device: str = "cpu", port: int = 30000) -> Launch:
    elsewhere = device != "cpu"
    return plan_launch(artifact, device, "10.0.0.1", port, list(extra), elsewhere=elsewhere, half=Half(mode))


@pytest.fixture
def mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all packages were there."""
    monkeypatch.setattr(halves, "half_findings", lambda *_: [])
    for name in ("SGLANG_HOST_IP", "MC_FORCE_TCP", "MOONCAKE_PROTOCOL", halves.STORE, halves.WITH_MOONCAKE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("mooncake")
def test_each_half_gets_sglangs_flags_and_tcp(compiled: Path) -> None:
    prefill, decode = launch(compiled, "prefill"), launch(compiled, "decode")
    common = ["--disaggregation-transfer-backend", "mooncake", "--disaggregation-bootstrap-port", "8998"]
    assert prefill.argv[-7:] == ["--disaggregation-mode", "prefill", *common, "--disable-overlap-schedule"]
    backup = ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    assert decode.argv[-8:] == ["--disaggregation-mode", "decode", *common, *backup]
    tcp = {"MC_FORCE_TCP": "1", "MOONCAKE_PROTOCOL": "tcp", "SGLANG_HOST_IP": "10.0.0.1"}
    assert tcp.items() <= decode.environment.items()
    assert any("all addresses" in note for note in prefill.notes)


def test_what_is_missing_is_named_with_its_package(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    without = {"mooncake", "sglang_router"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in without else real(name, *a))
    with pytest.raises(EnvironmentProblem, match=r"mooncake: not installed.*msconv\[pd\].*libibverbs1"):
        launch(compiled, "prefill")


@pytest.mark.usefixtures("mooncake")
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--speculative-algorithm", "NGRAM"], "drafts between a prefill and a decode server"),
        (["--dp-size", "2"], "each of the two servers is one copy"),
        (["--disaggregation-mode", "decode"], "`msconv serve --disaggregation prefill` or `decode`"),
        (["--disaggregation-decode-enable-offload-kvcache"], "plain pool of keys and values"),
    ],
)
def test_flags_that_do_not_go_with_a_half_are_refused(compiled: Path, extra: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        launch(compiled, "prefill", *extra)


@pytest.mark.usefixtures("mooncake")
def test_ports_that_cannot_be(compiled: Path) -> None:
    with pytest.raises(UsageError, match="the server itself listens there"):
        launch(compiled, "prefill", port=8998)
    with pytest.raises(UsageError, match="prefills and decodes has none"):
        chosen_half(None, 8998)
    assert chosen_half(None, None) is None
    done = run_msconv("serve", compiled, "--bootstrap-port", "8998", "--print-command")
    assert (done.code, "Add --disaggregation prefill or decode" in done.stderr) == (2, True)


def test_an_npu_half_takes_ascends_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    from msconv_runtime.targets import target_named

    target = target_named("ascend910b")
    for name in (halves.STORE, halves.WITH_MOONCAKE):
        monkeypatch.delenv(name, raising=False)
    assert halves.half_flags(Half("decode"), target)["--disaggregation-transfer-backend"] == "ascend"
    assert "ASCEND_MF_STORE_URL" in halves.half_problems(target, {}, elsewhere=False)[0]
    monkeypatch.setenv(halves.WITH_MOONCAKE, "1")
    assert halves.half_flags(Half("decode"), target)["--disaggregation-transfer-backend"] == "mooncake"
    assert halves.half_problems(target, {}, elsewhere=False) == []


class Receiver:
    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def test_requests_of_another_artifacts_prefill_server_fail_at_once(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = transfer.identity(str(compiled), "cpu")
    manager: Any = SimpleNamespace(prefill_info_table={}, failed={})
    manager.record_failure = manager.failed.__setitem__
    theirs = {"same:1": mine, "other:1": mine.replace("xxh3:", "xxh3:0", 1), "foreign:1": None}
    monkeypatch.setattr(transfer, "own_identity", lambda: mine)

    def original(manager: Any, address: str) -> bool:
        if address == "pages:1":
            raise RuntimeError("Page size mismatch")
        manager.prefill_info_table[address] = SimpleNamespace(kv_layout=theirs[address])
        return True

    found = {a: transfer.ask_of_prefill(original, manager, a) for a in (*theirs, "pages:1")}
    assert found == {"same:1": True, "other:1": False, "foreign:1": False, "pages:1": False}
    assert list(manager.prefill_info_table) == ["same:1"]
    requests = {
        address: [SimpleNamespace(kv_receiver=Receiver(), req=SimpleNamespace(bootstrap_room=room))]
        for room, address in enumerate(found)
    }
    waiting = [request for address in requests if address != "same:1" for request in requests[address]]
    queue = SimpleNamespace(kv_manager=manager)
    ready, left = transfer.fail_refused(lambda *_: ({"same:1": requests["same:1"]}, waiting), queue, requests)
    assert (list(ready), left) == (["same:1"], [])
    assert not requests["same:1"][0].kv_receiver.aborted and requests["other:1"][0].kv_receiver.aborted
    assert "another artifact: weights" in manager.failed[1]
    assert "no artifact" in manager.failed[2] and "Page size" in manager.failed[3]


def test_two_servers_of_other_configurations_or_targets_have_other_identities(own_artifact: Path) -> None:
    before = transfer.identity(str(own_artifact), "cpu")
    transfer.identity.cache_clear()
    assert transfer.identity(str(own_artifact), "ascend910b") != before
    manifest = read_manifest(own_artifact)
    write_manifest(own_artifact, replace(manifest, model=replace(manifest.model, config_digest="xxh3:0")))
    transfer.identity.cache_clear()
    assert transfer.identity(str(own_artifact), "cpu") != before


def test_what_comes_next_can_be_pasted() -> None:
    lines = halves.next_steps("prefill", "a b", "http://10.0.0.1:30000", 30000, 9000, "curl X")
    assert (
        lines[0].strip() == "next:   msconv serve 'a b' --disaggregation decode --port 30001 --bootstrap-port 9000"
    )
    assert "--prefill http://10.0.0.1:30000 9000 --decode http://10.0.0.1:30001" in lines[1]
    assert halves.next_address("prefill", "http://10.0.0.1:30000", 30000) == "http://10.0.0.1:30002"

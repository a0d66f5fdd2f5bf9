"""Conversions by nodes of a Ray cluster on this machine: the bytes of one process, whatever is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.int8_checkpoints import dense_checkpoint, modelslim, static_attention
from tests.ray.nodes import BIN, Nodes, below, movers, msconv, nodes, started, title
from tests.stream.moe_models import KINDS
from tests.synthetic import digests

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BIN / "ray").exists(), reason="needs an environment of its own: `make test-ray` makes it"
    ),
]
LINES = 48  # of a journal: as many as the smallest model has tensors, about
KILLS = int(os.environ.get("MSCONV_RAY_KILLS", "20"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    yield from nodes()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Storage for all nodes: a file system of its own, where one may be mounted here."""
    place, image = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("disk") / "image"
    with image.open("wb") as f:
        f.truncate(512 << 20)
    is_mounted = all(
        subprocess.run(command, capture_output=True).returncode == 0
        for command in (["mkfs.ext4", "-q", image], ["mount", "-o", "loop", image, place])
    )
    print(f"shared storage: {'ext4, mounted for this test' if is_mounted else 'a directory'}")
    yield place
    if is_mounted:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def models(shared: Path) -> dict[str, tuple[Path, tuple[object, ...]]]:
    """By kind: a checkpoint, and the options of its conversion."""
    bf16 = dense_checkpoint(
        shared / "models" / "bf16", hidden_size=512, intermediate_size=1536, num_hidden_layers=4, vocab_size=2047
    )
    fp8 = KINDS["deepseek FP8"][0](shared / "models" / "fp8")
    return {
        "bf16": (bf16, ("--tp", 2)),
        "FP8": (fp8, ("--tp", 4, "--ep", 2, "--dtype", KINDS["deepseek FP8"][1] or "bfloat16")),
        "W8A8": (bf16, ("--tp", 2, "--quant", "w8a8")),
        "W8A8 of ModelSlim": (modelslim(bf16, shared / "models" / "int8", static_attention), ("--tp", 2)),
    }


@pytest.fixture(scope="module")
def whole(shared: Path, models: dict[str, tuple[Path, tuple[object, ...]]]) -> dict[str, dict[str, str]]:
    """By kind: what threads of one process make of it."""
    found = {}
    for kind, (model, options) in models.items():
        out = shared / "whole" / kind
        done = msconv("convert", model, *options, "--output", out)
        assert done.returncode == 0, done.stderr
        found[kind] = digests(out)
    return found


Models = dict[str, tuple[Path, tuple[object, ...]]]
Whole = dict[str, dict[str, str]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_nodes_write_the_bytes_of_one_process(
    cluster: Nodes, shared: Path, models: Models, whole: Whole, count: int
) -> None:
    cluster.have(count)
    for kind, (model, options) in models.items():
        out = shared / f"out-{count}-{kind}"
        done = msconv("convert", model, *options, "--output", out, "--ray", cluster.address, batch_kilobytes=200)
        assert done.returncode == 0, done.stderr
        assert f"Nodes at work: {count}, --jobs 2 each: " in done.stderr
        assert digests(out) == whole[kind], kind
    assert not cluster.movers()


def test_a_node_with_other_storage_is_named_and_nothing_is_written(
    cluster: Nodes, shared: Path, models: Models, whole: Whole
) -> None:
    """In a mount namespace of its own, with another file system where the shared one is."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    cluster.have(1)
    cluster.add("unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{shared}" && exec "$@"', "sh")
    cluster.have(2)
    model, options = models["bf16"]
    for out, force in ((shared / "new", ()), (shared / "whole" / "bf16", ("--force",))):
        done = msconv("convert", model, *options, "--output", out, "--ray", cluster.address, *force)
        assert done.returncode == 5, done.stderr
        assert "1 of 2 nodes cannot do this conversion" in done.stderr
        assert "its storage is not this machine's" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (shared / "new" / "weights").exists()
    assert digests(shared / "whole" / "bf16") == whole["bf16"]
    cluster.have(1)


def test_kills_of_workers_and_drivers_lose_nothing(
    cluster: Nodes, shared: Path, models: Models, whole: Whole
) -> None:
    """At random moments; runs go on with Ray or without it until all is done, and then again from the start."""
    cluster.have(2)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng, model, options, out = random.Random(seed), *models["bf16"], shared / "killed"
    kills = {"worker": 0, "driver": 0}
    ends = {"whole": 0, "half": 0, "resumed by threads": 0}
    fresh: tuple[str, ...] = ()
    while sum(kills.values()) < KILLS:
        run = ("convert", model, *options, "--output", out)
        driver = started(*run, "--ray", cluster.address, *fresh, batch_kilobytes=150)
        for victim in _kill_some(driver, cluster.movers, out, rng):
            kills[victim] += 1
        said, _ = driver.communicate(timeout=180)
        assert "Traceback" not in said, said
        fresh = ()
        if driver.returncode == -signal.SIGKILL and rng.random() < 0.4:
            done = msconv(*run)
            assert done.returncode == 0, done.stderr
            ends["resumed by threads"] += "Resumed" in done.stderr
        elif driver.returncode:
            assert driver.returncode in (-signal.SIGKILL, 5), said
            if not (out / "READY").exists():  # else it was killed after all was done, or before it began anew
                ends["half"] += 1
                continue
        assert digests(out) == whole["bf16"]
        ends["whole"] += 1
        fresh = ("--force",)
    done = msconv(*run)
    assert done.returncode == 0, done.stderr
    assert digests(out) == whole["bf16"]
    print(kills, ends)
    assert min(kills.values()) >= KILLS // 5
    assert ends["half"] + ends["resumed by threads"] >= KILLS // 5
    deadline = time.monotonic() + 30
    while cluster.movers():
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.5)


def _kill_some(
    driver: subprocess.Popen[str], movers: Callable[[], list[int]], out: Path, rng: random.Random
) -> list[str]:
    """Some workers, one after another, or the driver: at a random moment, or when so much is journaled.  Returns
    who was killed."""
    killed = list[str]()
    for _ in range(rng.randint(1, 3)):
        moment = time.monotonic() + rng.uniform(0, 30)
        lines = rng.randrange(LINES) if rng.random() < 0.8 else 2 * LINES
        while driver.poll() is None and time.monotonic() < moment and _journaled(out) <= lines:
            time.sleep(0.02)
        if driver.poll() is not None:
            break
        workers = movers()
        victim = "worker" if workers and rng.random() < 0.6 else "driver"
        with suppress(ProcessLookupError):
            os.kill(rng.choice(workers) if victim == "worker" else driver.pid, signal.SIGKILL)
            killed.append(victim)
        if victim == "driver":
            break
    return killed


def _journaled(out: Path) -> int:
    """Lines of the journal."""
    try:
        return (out / ".msconv" / "journal.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def test_a_node_that_is_lost_is_done_without(cluster: Nodes, shared: Path, models: Models, whole: Whole) -> None:
    cluster.have(2)
    model, options = models["bf16"]
    out = shared / "lost"
    driver = started(
        "convert", model, *options, "--output", out, "--ray", cluster.address, "--jobs", 1, batch_kilobytes=60
    )
    while driver.poll() is None and len(cluster.movers()) < 2:
        time.sleep(0.05)
    time.sleep(1.0)
    node = cluster.working.pop()
    for process in [*below(node.pid), node.pid]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    node.wait()
    said, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, said
    assert digests(out) == whole["bf16"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_can_be_resumed(
    shared: Path, models: Models, whole: Whole, number: signal.Signals
) -> None:
    """Of `--ray local`, with all that it started."""
    model, options = models["bf16"]
    out = shared / f"signal-{number.name}"
    run = ("convert", model, *options, "--output", out)
    driver = started(*run, "--ray", "local", batch_kilobytes=60)
    while driver.poll() is None and not movers(driver.pid):
        time.sleep(0.05)
    time.sleep(0.3)
    there = below(driver.pid)
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode in (130, 0), said
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while left := [title(p) for p in there if "ray" in title(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    done = msconv(*run, "--ray", "local", "--json")
    assert done.returncode == 0, done.stderr
    assert digests(out) == whole["bf16"]


def test_two_drivers_at_a_time_and_what_does_not_answer(cluster: Nodes, shared: Path, models: Models) -> None:
    cluster.have(1)
    model, options = models["bf16"]
    run = ("convert", model, *options, "--output", shared / "two")
    first = started(*run, "--ray", cluster.address, batch_kilobytes=40)
    while first.poll() is None and not cluster.movers():
        time.sleep(0.05)
    second = msconv(*run, "--ray", cluster.address)
    said, _ = first.communicate(timeout=180)
    assert first.returncode == 0, said
    assert second.returncode in (0, 1)
    if second.returncode:
        assert "is working on this directory" in second.stderr
    done = msconv(*run, "--ray", "127.0.0.1:9")
    assert done.returncode == 4
    assert "nothing answers there" in done.stderr

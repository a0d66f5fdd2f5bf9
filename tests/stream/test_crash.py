"""kill -9, power cuts, SIGTERM and Ctrl-C at any moment: run again, and the bytes are those of a quiet run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.integrity import check_artifact
from msconv_runtime.errors import ArtifactError
from tests.commands import run_command, run_msconv
from tests.every import EVERY
from tests.stream.crashes import FAULTS, faulty
from tests.stream.faults import Fault
from tests.synthetic import digests, qwen3_config, write_synthetic

pytestmark = pytest.mark.slow
MOST, FEWEST = (0, 50) if EVERY else (16, 14)  # steps; `make test-crashes` takes all
KILLS = 9 if EVERY else 4  # of real commands


# `msconv` as it is, but durable every megabytes given first, so that a model of 70 MB has something to resume
DURABLE = """
import sys
import msconv.stream.execute as streaming
streaming.CHECKPOINT_BYTES = int(sys.argv.pop(1)) << 20
from msconv.cli import main
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few bytes, for as many runs as a conversion has steps."""
    return write_synthetic(tmp_path_factory.mktemp("tiny") / "tiny", qwen3_config(), shards=2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers as wide as Qwen3-0.6B's, 70 MB: moving it takes as long as starting Python."""
    config = qwen3_config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=2047,
    )
    return write_synthetic(tmp_path_factory.mktemp("large") / "large", config, shards=3)


def sweep(
    model: Path,
    root: Path,
    do: str,
    begin: str,
    *options: str,
    times: int = 1,
    tp: int = 2,
    durable_every: int = 1,
) -> dict[str, Any]:
    """`do` at every step of a conversion, or at `MOST` of them, and what went wrong.  See faults.py."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    spec = {"do": do, "times": times, "begin": begin, "durable_every": durable_every, "seed": seed}
    spec |= {"root": str(root), "jobs": [1, 2, 3], "most": MOST}
    line = [sys.executable, str(FAULTS), "--sweep", json.dumps(spec), "convert", "--model", str(model)]
    done = run_command([*line, "--tp", str(tp), *options], None, 300)
    assert done.code == 0, done.stderr
    assert not done.json["problems"], "\n".join(done.json["problems"])
    return done.json


@pytest.mark.parametrize(("do", "tp"), [("kill", 2), ("cut", 1)])
def test_a_kill_or_a_power_cut_at_any_step_loses_nothing(tiny: Path, tmp_path: Path, do: str, tp: int) -> None:
    done = sweep(tiny, tmp_path / "sweep", do, "nothing", tp=tp)
    assert done["ended"] >= FEWEST
    weights = [f"replace model-rank-{rank}-part-0.safetensors" for rank in range(tp)]
    expected = [*weights, "replace config.json", "replace msconv.json", "replace READY", "unlink journal.jsonl"]
    assert [step for step in done["steps"][-25:] if step in expected] == expected


@pytest.mark.parametrize("begin", ["the last step undone", "a lost file"])
def test_a_kill_at_any_step_of_mending_loses_nothing(tiny: Path, tmp_path: Path, begin: str) -> None:
    sweep(tiny, tmp_path / "sweep", "kill", begin, durable_every=2000)


def test_a_kill_at_any_step_of_starting_over_leaves_nothing_that_looks_finished(
    tiny: Path, tmp_path: Path
) -> None:
    done = sweep(tiny, tmp_path / "sweep", "kill", "all done", "--force", durable_every=2000)
    assert "unlink READY" in done["steps"]
    assert done["ended"] >= FEWEST


@pytest.mark.parametrize(("do", "times"), [("SIGTERM", 1), ("SIGINT", 3)])
def test_a_signal_at_any_step_exits_130_and_loses_nothing(tiny: Path, tmp_path: Path, do: str, times: int) -> None:
    done = sweep(tiny, tmp_path / "sweep", do, "nothing", times=times, durable_every=2000)
    assert done["ended"] >= FEWEST


# Real commands, by the clock


def command(model: Path, out: Path, tp: int, jobs: int, durable: int) -> list[str]:
    options = ["convert", "--model", str(model), "--tp", str(tp), "--jobs", str(jobs), "--output", str(out)]
    start = ["-c", DURABLE, str(durable)] if durable else ["-m", "msconv"]
    return [sys.executable, *start, *options]


def start(line: list[str], out: Path) -> subprocess.Popen[str]:
    """The command, from the moment on when it holds the output directory."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    holder = out / ".msconv" / "holder"
    while process.poll() is None:
        if holder.exists() and f"process {process.pid} " in holder.read_text():
            break
        time.sleep(0.001)
    return process


def end(process: subprocess.Popen[str], moment: float, how: signal.Signals) -> tuple[int, str]:
    """Its exit code and stderr after `how` at `moment` (in seconds from now), if it takes so long."""
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(how)
    words = process.communicate(timeout=60)[1]
    return process.returncode, words


def pretends(out: Path) -> bool:
    """It looks finished and is not."""
    try:
        return bool(check_artifact(Artifact(out)))
    except ArtifactError:
        return False


@pytest.mark.parametrize(("tp", "durable"), [(4, 4), (2, 16), (8, 0)])
def test_a_command_killed_again_and_again_ends_with_the_same_bytes(
    large: Path, tmp_path: Path, tp: int, durable: int
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = start(command(large, tmp_path / "whole", tp, 2, durable), tmp_path / "whole")
    begun = time.monotonic()
    assert end(whole, 60, signal.SIGKILL)[0] == 0
    seconds = time.monotonic() - begun
    expected = digests(tmp_path / "whole")
    kills = resumed = attempt = 0
    while kills < KILLS or not resumed:
        attempt += 1
        out = tmp_path / str(attempt)
        for turn in range(4):  # of them all but the first resume
            process = start(command(large, out, tp, rng.choice([1, 2, 3, 5]), durable), out)
            code, words = end(process, rng.uniform(0, seconds), signal.SIGKILL)
            assert code in (0, -9), words
            assert not pretends(out)
            kills += code == -9
            resumed += code == -9 and turn > 0
            if code == 0:
                break
        done = run_command(command(large, out, tp, rng.choice([1, 2, 3, 5]), durable), None, 120)
        assert done.code == 0, done.stderr
        assert digests(out) == expected
        shutil.rmtree(out)
        assert attempt < 40, f"only {kills} kills came in time, {resumed} of them while it resumed"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_command_exits_130_says_how_to_go_on_and_resumes(
    large: Path, tmp_path: Path, how: signal.Signals
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = start(command(large, tmp_path / "whole", 4, 2, 4), tmp_path / "whole")
    begun = time.monotonic()
    assert end(whole, 60, signal.SIGKILL)[0] == 0
    seconds = time.monotonic() - begun
    expected = digests(tmp_path / "whole")
    interrupted = 0
    for attempt in range(20):
        out = tmp_path / str(attempt)
        code, words = end(start(command(large, out, 4, 2, 4), out), rng.uniform(0, seconds * 0.9), how)
        too_late = code == -how and "Written" in words  # Python itself was ending
        assert code in (0, 130) or too_late, words
        assert "Traceback" not in words
        assert not pretends(out)
        if code == 130:
            interrupted += 1
            assert "Interrupted" in words
            assert "again" in words
            assert "resume" in words
        done = run_command(command(large, out, 4, 3, 4), None, 120)
        assert done.code == 0, done.stderr
        assert digests(out) == expected
        shutil.rmtree(out)
        if interrupted == 3:
            break
    assert interrupted


@pytest.fixture(scope="module")
def of_four_ranks(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of a quiet run."""
    out = tmp_path_factory.mktemp("quiet") / "whole"
    assert run_msconv("convert", "--model", large, "--tp", 4, "--output", out).code == 0
    found = digests(out)
    shutil.rmtree(out)
    return found


@pytest.mark.parametrize(("first", "second"), [(1, 5), (5, 1), (3, 2)])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_any_number_of_workers_resumes_what_any_other_began(
    large: Path, of_four_ranks: dict[str, str], tmp_path: Path, first: int, second: int, share: float
) -> None:
    options = ("convert", "--model", large, "--tp", 4, "--json")
    writes = 100  # more than a worker makes before it is asked to stop
    out = tmp_path / "out"
    killed = faulty(Fault("kill", round(share * writes), ("pwrite",)), *options, "--jobs", first, "--output", out)
    assert killed.code == -signal.SIGKILL
    assert not (out / "READY").exists()
    recorded = (out / ".msconv" / "journal.jsonl").read_text().count("\n") - 1
    done = run_msconv(*options, "--jobs", second, "--output", out)
    assert done.code == 0, done.stderr
    assert done.json["resumed"] is (recorded > 0)
    assert digests(out) == of_four_ranks


def test_a_resumed_command_reads_only_the_rest_and_says_so(large: Path, tmp_path: Path) -> None:
    options = ("convert", "--model", large, "--tp", 4, "--json", "--output", tmp_path / "out")
    assert faulty(Fault("SIGTERM", 90, ("pwrite",)), *options).code == 130
    done = run_msconv(*options)
    size = sum(p.stat().st_size for p in large.glob("*.safetensors"))
    assert 0 < done.json["bytes_read"] < size
    assert "Resumed" in done.stderr


def test_a_killed_conversion_is_no_artifact_for_any_command(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("convert", "--model", large, "--tp", 2, "--output", out)
    assert faulty(Fault("kill", 1, ("replace",), "READY"), *options).code == -signal.SIGKILL
    for line in (("inspect", out), ("reshard", out, "--tp", 4, "--output", tmp_path / "other")):
        done = run_msconv(*line, "--json")
        assert done.code == 1
        assert done.json["error"]["code"] == "artifact"
        assert "resumes" in done.json["error"]["hint"]
    assert not (tmp_path / "other" / "READY").exists()


def test_the_lock_of_a_killed_process_is_free_at_once(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(command(large, out, 4, 1, 0), out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert run_msconv("convert", "--model", large, "--tp", 4, "--output", out).code == 0

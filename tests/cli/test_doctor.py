"""`msconv doctor`: every fact may be missing, wrong or damaged, and is a finding then."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from msconv_runtime.doctor.machine import installed
from msconv_runtime.versions import in_series
from tests.cli.machines import (
    ALL,
    GRAPHS,
    NOT_NPU,
    NUMERIC,
    PINS,
    SERVE,
    SMI,
    TESTED,
    cannot,
    examine,
    finding,
    machine,
    with_npu,
    write,
)
from tests.cli.test_cli import HEAVY, check_error, imported
from tests.commands import run_msconv

# The real machine


def test_this_machine_is_fine_and_nothing_heavy_is_imported() -> None:
    done = run_msconv("doctor", "--json", python=("-X", "importtime"))
    assert done.code == 0, done.stderr
    assert not imported(done.stderr) & {*HEAVY, "numpy", "numba", "safetensors", "rich"}
    assert set(done.json) == {"ok", "python", "findings", "can", "artifact"}
    assert done.json["ok"] is True
    assert done.json["python"] == ".".join(map(str, sys.version_info[:3]))
    assert done.json["artifact"] is None
    assert set(done.json["can"]) == ALL
    assert all(done.json["can"][a] for a in ALL - NOT_NPU)
    for f in done.json["findings"]:
        assert set(f) == {"name", "state", "found", "needed", "hint"}
        assert f["state"] in ("ok", "missing", "untested", "wrong")
        assert f["found"]
        assert f["state"] == "ok" or (f["needed"] and f["hint"]), f


def test_it_takes_less_than_two_seconds(compiled: Path) -> None:
    def seconds() -> float:
        started = time.perf_counter()
        assert run_msconv("doctor", compiled).code == 0
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 2


def test_lines_are_aligned_and_the_next_command_comes_last(compiled: Path) -> None:
    done = run_msconv("doctor", compiled)
    assert done.code == 0
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert all(re.match(r"(ok      |missing |untested|wrong   |can     |cannot  )  \S", line) for line in lines)
    findings = [line for line in lines if not line.startswith("can")]
    assert len({re.search(r"\S  +(\S)", line[10:]).start(1) for line in findings if len(line) > 30}) == 1  # type: ignore[union-attr]
    assert any("nothing of msconv has run on an NPU yet" in line for line in lines)
    assert done.stderr.splitlines()[-1] == f"Next: msconv verify {compiled}"
    assert run_msconv("doctor").stderr.splitlines()[-1].startswith("Next: msconv recipes  # ")


def test_tables_agree_with_what_is_pinned_and_what_is_loaded() -> None:
    for name in TESTED.keys() & PINS.keys():
        assert in_series(PINS[name], TESTED[name].tested), name
    assert set(TESTED) - set(PINS) == {"msconv", "torch_npu"}


# Packages, Python, platform


def test_a_complete_machine_can_do_all_but_serve_on_an_npu(tmp_path: Path) -> None:
    report = examine(machine(tmp_path))
    assert cannot(report) == NOT_NPU
    assert not report.blockers


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("numpy", ALL),
        ("ml_dtypes", ALL),
        ("filelock", ALL),
        ("numba", NOT_NPU),
        ("mindspore", GRAPHS),
        ("torch", NUMERIC),
        ("transformers", NUMERIC),
        ("safetensors", NUMERIC),
        ("sglang", SERVE),
        ("msconv", SERVE),
    ],
)
def test_a_missing_package_is_a_finding(tmp_path: Path, name: str, lost: set[str]) -> None:
    report = examine(machine(tmp_path, {name: None}))
    found = finding(report, name)
    assert (found.state, found.found) == ("missing", "not installed")
    assert found.hint
    assert cannot(report) == lost
    assert bool(report.blockers) == ("convert" in lost)


@pytest.mark.parametrize(
    ("name", "version", "state", "lost"),
    [
        ("numpy", "1.26.0", "ok", NOT_NPU),
        ("numpy", "1.25.2", "untested", NOT_NPU),
        ("numpy", "2.0.0", "wrong", GRAPHS),
        ("numpy", "12.1", "wrong", GRAPHS),
        ("mindspore", "2.8.0", "ok", NOT_NPU),
        ("mindspore", "2.10.3", "ok", NOT_NPU),
        ("mindspore", "2.9.0", "wrong", {"compile", *NOT_NPU}),
        ("mindspore", "2.80.0", "wrong", {"compile", *NOT_NPU}),
        ("torch", "2.13.0+cpu", "ok", NOT_NPU),
        ("torch", "2.12.1", "untested", NOT_NPU),
        ("sglang", "0.5.24", "untested", NOT_NPU),
        ("transformers", "5.2.0", "untested", NOT_NPU),
        ("torch_npu", "2.8.0", "untested", NOT_NPU),
        ("torch", "of unreadable version", "untested", NOT_NPU),
    ],
)
def test_versions_are_held_against_the_table(
    tmp_path: Path, name: str, version: str, state: str, lost: set[str]
) -> None:
    report = examine(machine(tmp_path, {name: version}))
    assert (finding(report, name).state, finding(report, name).found) == (state, version)
    assert cannot(report) == lost


@pytest.mark.parametrize(
    "error", [KeyError("Version"), PermissionError(13, "no"), UnicodeDecodeError("a", b"", 0, 1, "")]
)
def test_damaged_metadata_is_no_crash(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def version(name: str) -> str:
        raise error

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed("torch") == "of unreadable version"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: None)
    assert installed("torch") == "of unknown version"


@pytest.mark.parametrize(
    ("facts", "name", "state", "lost"),
    [
        ({"python": "3.12.1"}, "python", "untested", NOT_NPU),
        ({"python": "3.13.0"}, "python", "wrong", ALL),
        ({"python": "3.1.1"}, "python", "wrong", ALL),
        ({"system": "Linux aarch64"}, "platform", "untested", NOT_NPU),
        ({"system": "Darwin arm64"}, "platform", "wrong", ALL),
    ],
)
def test_python_and_platform(tmp_path: Path, facts: dict[str, Any], name: str, state: str, lost: set[str]) -> None:
    report = examine(machine(tmp_path, **facts))
    assert finding(report, name).state == state
    assert cannot(report) == lost


@pytest.mark.parametrize("output", ["x" * 300 + "/y", "\udcff", "/proc/1/root/secret", "/dev/null", "a\0b"])
def test_the_disk_is_that_of_the_output_or_of_what_is_above_it(tmp_path: Path, output: str) -> None:
    assert finding(examine(machine(tmp_path, output=tmp_path / "new/er")), "disk free").state == "ok"
    assert finding(examine(machine(tmp_path, output=Path(output))), "disk free").found


def test_a_full_disk_is_no_place_to_convert_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))  # type: ignore[attr-defined]
    report = examine(machine(tmp_path))
    assert finding(report, "disk free").state == "wrong"
    assert cannot(report) == {"convert", "serve_npu"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"proc/meminfo": "MemAvailable: 2048 kB\n"}, 2 << 20),
        ({"proc/meminfo": "nonsense"}, None),
        ({"proc/meminfo": "MemAvailable: 9999 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 9999 << 10),
        (
            {
                "proc/meminfo": "MemAvailable: 9999 kB\n",
                "sys/fs/cgroup/memory.max": "3000\n",
                "sys/fs/cgroup/memory.current": "2500\n",
                "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100\nactive_file 20\n",
            },
            620,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 9999 kB\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
            },
            0,
        ),
    ],
)
def test_free_memory_is_what_machine_and_container_leave(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    m = machine(tmp_path)
    assert m.memory() == free
    report = examine(m)
    assert finding(report, "memory free").state == ("untested" if free is None else "wrong")
    assert report.can["convert"] == (free is None)


# CANN, driver, devices


@pytest.mark.parametrize(
    ("name", "text", "version", "state"),
    [
        (
            "ascend-toolkit/latest/version.cfg",
            "# v\nruntime_running_version=[7.6.0:8.2.RC1]\n",
            "8.2.RC1",
            "untested",
        ),
        ("ascend-toolkit/latest/version.cfg", "runtime_running_version=[8.5.0]\n", "8.5.0", "untested"),
        ("ascend-toolkit/latest/version.cfg", "runtime_running_version=[7.6.0.1.220:8.0.0]", "8.0.0", "wrong"),
        ("ascend-toolkit/latest/version.cfg", "what is this", "none", "missing"),
        (
            "ascend-toolkit/latest/runtime/version.info",
            "Version=7.7.0\nversion_dir=8.3.RC1\n",
            "8.3.RC1",
            "untested",
        ),
        ("cann/compiler/version.info", "Version=9.1.0-beta.2\nversion_dir=cann\n", "9.1.0-beta.2", "untested"),
        ("cann/compiler/version.info", "Version=10.0.0\n", "10.0.0", "wrong"),
    ],
)
def test_cann_is_found_where_it_says_its_version(
    tmp_path: Path, name: str, text: str, version: str, state: str
) -> None:
    write(tmp_path / "usr/local/Ascend" / name, text)
    found = finding(examine(machine(tmp_path)), "CANN")
    assert (found.state, found.found.split()[0]) == (state, version)
    away = tmp_path / "opt"
    write(away / Path(name).relative_to(Path(name).parts[0]), "version_dir=8.5.0")
    report = examine(machine(tmp_path, environ={"ASCEND_HOME_PATH": str(away), "ASCEND_TOOLKIT_HOME": "x" * 5000}))
    assert str(away) in finding(report, "CANN").found


def test_a_machine_with_npu_may_serve_and_is_told_that_nothing_ran_there(tmp_path: Path) -> None:
    report = examine(with_npu(tmp_path))
    assert cannot(report) == set()
    assert finding(report, "driver").found == "25.0.rc1.1"
    assert finding(report, "devices").found == "2 of /dev/davinci*"
    assert {finding(report, n).state for n in ("CANN", "driver", "devices", "torch_npu")} == {"untested"}
    assert finding(report, "on a device").found == "nothing of msconv has run on an NPU yet"


@pytest.mark.parametrize(
    "path", ["usr/local/Ascend/ascend-toolkit/latest/version.cfg", "usr/local/Ascend/driver/version.info", "dev"]
)
def test_each_part_of_an_npu_is_needed(tmp_path: Path, path: str) -> None:
    m = with_npu(tmp_path)
    gone = tmp_path / path
    gone.rename(tmp_path / "elsewhere")
    assert cannot(examine(m)) == NOT_NPU
    gone.mkdir()  # of another kind than was expected
    assert cannot(examine(m)) == NOT_NPU


@pytest.mark.parametrize(
    ("value", "fits"), [("0,1", True), ("1", True), ("0,2", False), ("", False), ("0-1", False)]
)
def test_visible_devices_must_be_there(tmp_path: Path, value: str, fits: bool) -> None:
    report = examine(with_npu(tmp_path, environ={"ASCEND_RT_VISIBLE_DEVICES": value}))
    assert report.can["serve_npu"] is fits
    assert report.can["serve_cpu"]


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        (f"#!/bin/sh\ncat <<END{SMI}END\n", "wrong", "Ascend910 OK, Ascend910 HEALTH"),
        (f"#!/bin/sh\ncat <<END{SMI.replace('HEALTH ', 'OK     ')}END\n", "ok", "Ascend910 OK, Ascend910 OK"),
        ("#!/bin/sh\nexit 3\n", "wrong", "exit code 3"),
        ("#!/bin/sh\nprintf '\\377'\n", "wrong", "no chip named"),
        ("#!/bin/sh\nexec sleep 60\n", "wrong", "timed out"),
        ("#!/no/such/interpreter\n", "wrong", "No such file"),
    ],
)
def test_npu_smi_is_asked_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str, words: str
) -> None:
    monkeypatch.setattr("msconv_runtime.doctor.ascend.NPU_SMI_S", 1)
    write(tmp_path / "bin/npu-smi", script).chmod(0o755)
    report = examine(machine(tmp_path, environ={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}))
    assert finding(report, "npu-smi").state == state
    assert words in finding(report, "npu-smi").found
    assert not report.blockers


# Environment variables


@pytest.mark.parametrize(
    ("name", "value", "state", "lost"),
    [
        ("SGLANG_EXTERNAL_MODEL_PACKAGE", "other.models", "wrong", SERVE),
        ("SGLANG_EXTERNAL_MODEL_PACKAGE", "msconv_runtime.sglang", "ok", NOT_NPU),
        ("SGLANG_EXTERNAL_MODEL_PACKAGE", "msconv_runtimeXsglang", "wrong", SERVE),
        ("SGLANG_EXTERNAL_MODEL_PACKAGE", "", "ok", NOT_NPU),
        ("SGLANG_PLUGINS", "a, msconv", "ok", NOT_NPU),
        ("SGLANG_PLUGINS", "a,msconvert", "wrong", SERVE),
        ("MS_DEV_FORCE_USE_COMPILE_CACHE", "1", "wrong", GRAPHS),
        ("MS_DEV_FORCE_USE_COMPILE_CACHE", "0", "ok", NOT_NPU),
        ("MS_DEV_FORCE_USE_COMPILE_CACHE", "", "ok", NOT_NPU),
        ("MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST", "FlashAttentionScore,PagedAttention", "ok", NOT_NPU),
        ("MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST", "PagedAttention", "untested", NOT_NPU),
        ("MS_ENABLE_LCCL", "off", "ok", NOT_NPU),
        ("MS_ENABLE_LCCL", "on", "untested", NOT_NPU),
        ("HF_HUB_OFFLINE", "1", "untested", NOT_NPU),
        ("HF_HUB_OFFLINE", "\n", "untested", NOT_NPU),
        ("HF_HUB_OFFLINE", "0", "ok", NOT_NPU),
    ],
)
def test_variables_are_read(tmp_path: Path, name: str, value: str, state: str, lost: set[str]) -> None:
    report = examine(machine(tmp_path, environ={name: value}))
    assert finding(report, name).state == state
    assert cannot(report) == lost
    assert name not in {f.name for f in examine(machine(tmp_path)).findings}


def test_what_hides_an_installed_package_is_named(tmp_path: Path) -> None:
    for name in ("src/mindspore/__init__.py", "src/torch.py", "site/numpy/__init__.py", "site/acl.py"):
        write(tmp_path / name, "")
    (tmp_path / "site/numpy-1.26.4.dist-info").mkdir()
    path = os.pathsep.join([str(tmp_path / "src"), str(tmp_path / "site"), "", "nowhere", "x" * 5000])
    report = examine(machine(tmp_path, environ={"PYTHONPATH": path}))
    hidden = [f.found for f in report.findings if f.name == "PYTHONPATH"]
    assert hidden == [f"{tmp_path}/src/mindspore hides mindspore", f"{tmp_path}/src/torch.py hides torch"]
    assert cannot(report) == GRAPHS


def test_a_value_that_no_terminal_can_show_is_shown_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_ENABLE_LCCL", "\udcff\n")
    done = run_msconv("doctor")
    assert done.code == 0, done.stderr
    assert r"\udcff" in done.stdout
    assert "Traceback" not in done.stderr


# The command's answers


def test_a_machine_that_cannot_convert_exits_4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "numpy.py", "raise RuntimeError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_msconv("doctor", "--json")
    assert done.code == 4
    assert done.json["ok"] is False
    assert not any(done.json["can"].values())
    done = run_msconv("doctor")
    assert done.code == 4
    assert "Error: This is in the way: PYTHONPATH." in done.stderr
    assert done.stderr.splitlines()[-1] == f"Next: take {tmp_path} out of PYTHONPATH"


def test_what_stops_serving_only_does_not_fail_without_an_artifact(
    monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    monkeypatch.setenv("MS_DEV_FORCE_USE_COMPILE_CACHE", "1")
    done = run_msconv("doctor", "--json")
    assert (done.code, done.json["can"]["serve_cpu"]) == (0, False)
    done = run_msconv("doctor", compiled)
    assert done.code == 4
    assert done.stderr.splitlines()[-1] == "Next: `unset MS_DEV_FORCE_USE_COMPILE_CACHE`"


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "\udcff", "loop", "empty", "file"])
def test_what_is_no_artifact_exits_2(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    check_error(run_msconv("doctor", name, "--json", cwd=tmp_path), 2, "usage")


# Packages beside the engine


@pytest.mark.parametrize(
    ("sglang", "words"),
    [
        ("0.5.15", None),
        ("0.5.16", "Llama do not import"),
        ("0.5.19", "Llama do not import"),
        ("0.5.21", "get_world_group is gone"),
        ("0.5.23", "get_world_group is gone"),
        ("0.6.0", "get_world_group is gone"),
    ],
)
def test_a_model_package_that_does_not_go_with_this_sglang_is_named(
    tmp_path: Path, sglang: str, words: str | None
) -> None:
    report = examine(machine(tmp_path, versions={"sglang": sglang, "sgl-mindspore": "0.1.0"}))
    found = [f for f in report.findings if f.name == "sgl-mindspore"]
    if words is None:
        assert found == []
        return
    assert words in found[0].found
    assert f"0.1.0 beside sglang {sglang}" in found[0].found
    assert "artifact is served without it" in found[0].hint
    assert found[0].stops == ()

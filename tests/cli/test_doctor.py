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

import msgspec
import pytest

from msconv_runtime import doctor
from msconv_runtime.artifact import GraphInput, Manifest, Verified, read_manifest, write_manifest
from msconv_runtime.doctor import TESTED, Finding, Machine, Report, examine
from msconv_runtime.graphs import TESTED_MINDSPORE
from tests.cli.test_cli import HEAVY, check_error, imported
from tests.commands import run_msconv, run_python

REPO = Path(__file__).parents[2]
PINS = dict(line.split("==") for line in (REPO / "requirements/cpu.txt").read_text().split() if "==" in line)
GOOD = {**{name: PINS.get(name) for name in TESTED}, "msconv": TESTED["msconv"].tested[0]}
SMI = """
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 166.5       38                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3131 / 65536         |
| 1     Ascend910           | HEALTH        | -           37                0    / 0             |
| 0     1                   | 0000:9F:00.0  | 0           0    / 0          2886 / 65536         |
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def machine(root: Path, versions: dict[str, str | None] | None = None, **facts: Any) -> Machine:
    """A Linux machine with all that was tested on a CPU, 8 GiB free and no NPU; `facts` change it."""
    if not (root / "proc").exists():
        write(root / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:  {8 << 20} kB\n")
    known = {**GOOD, **(versions or {})}
    usual = {"environ": {}, "python": "3.11.9", "system": "Linux x86_64", "cores": 2, "output": root}
    return Machine(root=root, version=known.get, **{**usual, **facts})


def with_npu(root: Path, devices: int = 2, **facts: Any) -> Machine:
    """The same with torch_npu, CANN, driver and devices."""
    write(root / "usr/local/Ascend/ascend-toolkit/latest/version.cfg", "runtime_running_version=[7.6.0:8.5.0]\n")
    write(root / "usr/local/Ascend/driver/version.info", "Version=7.7.0.1\npackage_version=25.0.rc1.1\n")
    for i in range(devices):
        write(root / f"dev/davinci{i}", "")
    write(root / "dev/davinci_manager", "")
    return machine(root, {"torch_npu": "2.8.0"}, **facts)


def finding(report: Report, name: str) -> Finding:
    (found,) = [f for f in report.findings if f.name == name]
    return found


def cannot(report: Report) -> set[str]:
    return {ability for ability, can in report.can.items() if not can}


NOT_NPU = {"serve_npu"}
SERVE = {"serve_cpu", "serve_npu"}
NUMERIC = {"verify", *SERVE}
GRAPHS = {"compile", *NUMERIC}
ALL = {"convert", *GRAPHS}


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
    assert run_msconv("doctor").stderr.splitlines()[-1] == "Next: msconv convert --model <dir> --tp N"


def test_tables_agree_with_what_is_pinned_and_what_is_loaded() -> None:
    for name in TESTED.keys() & PINS.keys():
        assert doctor.of(PINS[name], TESTED[name].tested), name
    assert set(TESTED) - set(PINS) == {"msconv", "torch_npu"}
    assert tuple(f"{series}." for series in TESTED["mindspore"].tested) == TESTED_MINDSPORE


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
        ("numpy", "2.0.0", "wrong", ALL),
        ("numpy", "12.1", "wrong", ALL),
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
    assert doctor.installed("torch") == "of unreadable version"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: None)
    assert doctor.installed("torch") == "of unknown version"


@pytest.mark.parametrize(
    ("facts", "name", "state", "lost"),
    [
        ({"python": "3.12.1"}, "python", "wrong", ALL),
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
    monkeypatch.setattr(doctor, "NPU_SMI_S", 1)
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
        ("HF_HUB_OFFLINE", "1", "ok", NOT_NPU),
        ("HF_HUB_OFFLINE", "\n", "ok", NOT_NPU),
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


# An artifact


def change(root: Path, **changes: Any) -> Manifest:
    """Rewrite an artifact's manifest as if it had been made so."""
    manifest = msgspec.structs.replace(read_manifest(root), **changes)
    write_manifest(root, manifest)
    return manifest


def of_mindspore(root: Path, version: str) -> None:
    graphs = [msgspec.structs.replace(g, mindspore=version) for g in read_manifest(root).graphs]
    change(root, graphs=graphs)


def test_an_artifact_is_told_in_short(compiled: Path) -> None:
    done = run_msconv("doctor", compiled, "--json")
    assert done.code == 0
    rank = sum(p.stat().st_size for p in (compiled / "weights").iterdir())
    short = {"format": 1, "tp": 1, "ep": 1, "rank_bytes": rank, "proven": {"cpu": False}}
    assert done.json["artifact"] == {"path": str(compiled), "ready": True, **short}
    states = {f["name"]: f["state"] for f in done.json["findings"]}
    assert states["graphs cpu"] == "ok"
    assert states["proof cpu"] == "untested"
    assert states["memory to serve"] == "ok"
    assert states["graphs ascend910b"] == "missing"


def test_a_proof_is_seen_and_next_is_serve(own_artifact: Path) -> None:
    manifest = read_manifest(own_artifact)
    assert manifest.weights is not None
    proof = Verified(
        target="cpu",
        weights_digest=manifest.weights.digest,
        graph_digests=[g.digest for g in manifest.graphs],
        reference="r",
        mode="m",
        bound=1e-4,
        max_abs_logit_error=2e-6,
        argmax_agreement=1.0,
        ranks=1,
        logits_compared=1,
    )
    change(own_artifact, verified=[proof])
    done = run_msconv("doctor", own_artifact)
    assert "largest logit error 2.00e-06" in done.stdout
    assert done.stderr.splitlines()[-1] == f"Next: msconv serve {own_artifact}"
    (own_artifact / "graphs/cpu/decode.mindir").write_bytes(b"x")
    done = run_msconv("doctor", own_artifact, "--json")
    assert (done.code, done.json["artifact"]["proven"]) == (4, {"cpu": False})


def damage_ready(root: Path) -> None:
    (root / "READY").unlink()


def damage_ready_kind(root: Path) -> None:
    (root / "READY").unlink()
    (root / "READY").mkdir()


def damage_format(root: Path) -> None:
    path = root / "msconv.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))


def damage_manifest(root: Path) -> None:
    (root / "msconv.json").write_bytes(b"{")


def damage_graph(root: Path) -> None:
    path = root / "graphs/cpu/prefill.mindir"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def damage_weights(root: Path) -> None:
    os.truncate(next((root / "weights").iterdir()), 1000)


def damage_graphs(root: Path) -> None:
    change(root, graphs=read_manifest(root).graphs[:1])


@pytest.mark.parametrize(
    ("harm", "name", "state", "words"),
    [
        (damage_ready, "artifact", "wrong", "READY is missing"),
        (damage_ready_kind, "artifact", "wrong", "READY"),
        (damage_format, "artifact", "wrong", "format 99"),
        (damage_manifest, "artifact", "wrong", "not a valid manifest"),
        (damage_graph, "file", "wrong", "graphs/cpu/prefill.mindir: digest differs"),
        (damage_weights, "file", "wrong", "has 1000 bytes"),
        (damage_graphs, "graphs cpu", "missing", "decode of mindspore"),
        (lambda root: change(root, graphs=[]), "graphs cpu", "missing", "none"),
        (lambda root: change(root, weights=None), "weights", "missing", "none"),
        (lambda root: of_mindspore(root, "2.5.0"), "graphs cpu", "wrong", "2.5.0"),
    ],
)
def test_an_artifact_that_cannot_be_served_exits_4(
    own_artifact: Path, harm: Any, name: str, state: str, words: str
) -> None:
    harm(own_artifact)
    done = run_msconv("doctor", own_artifact, "--json")
    assert done.code == 4, done.stderr
    (found,) = [f for f in done.json["findings"] if f["name"] == name]
    assert found["state"] == state
    assert words in found["found"]
    assert found["hint"]
    assert done.json["can"]["convert"]
    assert not done.json["can"]["serve_cpu"]
    assert done.json["artifact"]["path"] == str(own_artifact)


@pytest.mark.parametrize(("here", "state"), [("2.8.0", "ok"), ("2.9.0", "untested"), (None, "untested")])
def test_graphs_are_held_against_the_installed_mindspore(
    compiled: Path, tmp_path: Path, here: str | None, state: str
) -> None:
    report = examine(machine(tmp_path, {"mindspore": here}), compiled)
    assert finding(report, "graphs cpu").state == state
    assert f"{here or 'none'} is installed" in finding(report, "graphs cpu").found
    assert report.can["serve_cpu"] is (here is not None)


def test_an_artifact_larger_than_free_memory_cannot_be_served(compiled: Path, tmp_path: Path) -> None:
    usual = float(finding(examine(machine(tmp_path), compiled), "memory to serve").needed.split()[0])
    for free, state in ((1.1 * usual, "ok"), (0.9 * usual, "untested"), (0.001, "wrong")):
        write(tmp_path / "proc/meminfo", f"MemAvailable: {int(free * (1 << 20))} kB\n")
        report = examine(machine(tmp_path), compiled)
        assert finding(report, "memory to serve").state == state, free
        assert report.can["serve_cpu"] is (state != "wrong")
    write(tmp_path / "proc/meminfo", "")
    assert finding(examine(machine(tmp_path), compiled), "memory to serve").state == "untested"


def test_ranks_are_held_against_cores_and_devices(own_artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(own_artifact)
    assert manifest.weights is not None
    files = [msgspec.structs.replace(f, rank=r) for r in range(4) for f in manifest.weights.files]
    tensors = [msgspec.structs.replace(t, digests=t.digests * 4) for t in manifest.weights.tensors]
    weights = msgspec.structs.replace(manifest.weights, files=files, tensors=tensors)
    parallel = msgspec.structs.replace(manifest.parallel, tp=4, ep=2)
    alone = finding(examine(machine(tmp_path), own_artifact), "memory to serve").needed
    change(own_artifact, weights=weights, parallel=parallel)
    report = examine(with_npu(tmp_path), own_artifact)
    assert (finding(report, "ranks on cores").state, finding(report, "ranks on cores").found) == (
        "untested",
        "4 on 2",
    )
    assert (finding(report, "ranks on devices").state, report.can["serve_npu"]) == ("wrong", False)
    assert report.can["serve_cpu"]
    assert float(finding(report, "memory to serve").needed.split()[0]) > 3.5 * float(alone.split()[0])
    fits = examine(with_npu(tmp_path, 4, cores=4), own_artifact)
    assert not {f.name for f in fits.findings} & {"ranks on cores", "ranks on devices"}


def add_ascend(root: Path) -> None:
    graphs = read_manifest(root).graphs
    change(root, graphs=[*graphs, *(msgspec.structs.replace(g, target="ascend910b") for g in graphs)])


def test_an_artifact_for_an_npu_can_be_served_there(own_artifact: Path, tmp_path: Path) -> None:
    add_ascend(own_artifact)
    report = examine(with_npu(tmp_path), own_artifact)
    assert cannot(report) == set()
    assert "has run on no device" in finding(report, "proof ascend910b").found
    change(own_artifact, graphs=[g for g in read_manifest(own_artifact).graphs if g.target != "cpu"])
    report = examine(with_npu(tmp_path), own_artifact)
    assert cannot(report) == {"serve_cpu"}
    assert not report.blockers


def test_damage_of_one_target_leaves_the_other(own_artifact: Path, tmp_path: Path) -> None:
    graphs = read_manifest(own_artifact).graphs
    npu = [msgspec.structs.replace(g, target="ascend910b", path=f"graphs/npu/{g.phase}") for g in graphs]
    change(own_artifact, graphs=[*graphs, *npu])
    report = examine(machine(tmp_path), own_artifact)
    assert {f.found.split(":")[0] for f in report.findings if f.name == "file"} == {g.path for g in npu}
    assert report.can["serve_cpu"]


def test_a_cache_without_width_is_counted(own_artifact: Path, tmp_path: Path) -> None:
    graphs = read_manifest(own_artifact).graphs
    caches = [GraphInput("k_cache.0", "float32", [None, None, None, 64])]
    change(own_artifact, graphs=[msgspec.structs.replace(g, inputs=caches) for g in graphs])
    assert finding(examine(machine(tmp_path), own_artifact), "memory to serve").state == "ok"


def test_a_graph_that_may_not_be_read_is_a_finding(own_artifact: Path, tmp_path: Path) -> None:
    path = own_artifact / "graphs/cpu/decode.mindir"
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read all: a directory that has the size will do
        path.unlink()
        path.mkdir()
        size = path.stat().st_size
        change(
            own_artifact,
            graphs=[msgspec.structs.replace(g, size=size) for g in read_manifest(own_artifact).graphs[:1]],
        )
    report = examine(machine(tmp_path), own_artifact)
    assert finding(report, "artifact").state == "wrong"
    assert not report.can["serve_cpu"]


@pytest.mark.parametrize("name", ["numpy", "mindspore", "torch", "sglang", "ml_dtypes", "filelock"])
def test_it_runs_where_a_package_cannot_be_imported(compiled: Path, name: str) -> None:
    code = (
        "import sys, importlib.metadata as m; name = sys.argv[1]; sys.modules[name] = None\n"
        "real = m.version\n"
        "def version(n):\n    if n == name: raise m.PackageNotFoundError(n)\n    return real(n)\n"
        "m.version = version; sys.argv = ['msconv', 'doctor', sys.argv[2], '--json']\n"
        "from msconv.cli import main\nmain()"
    )
    done = run_python(code, name, compiled)
    assert "Traceback" not in done.stderr
    assert done.code == 4, done.stderr
    states = {f["name"]: f["state"] for f in done.json["findings"]}
    assert states[name] == "missing"
    assert states["artifact"] == ("wrong" if name == "numpy" else "ok")

"""Building the CPU's kernels: once, tried before they are used, and done without where that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv_runtime import kernels
from msconv_runtime.errors import ArtifactError, UsageError
from msconv_runtime.graphs import Graphs
from msconv_runtime.kernels import Library, check, library
from msconv_runtime.kernels.compiler import Compiler
from msconv_runtime.kernels.variants import usable
from tests.commands import run_python
from tests.conftest import Checkpoints
from tests.conversions import convert


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MSCONV_COMPILED", raising=False)
    monkeypatch.delenv("MSCONV_NATIVE", raising=False)
    monkeypatch.delenv("MSCONV_KERNELS", raising=False)
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other variant is tried after the one that fails."""
    monkeypatch.setenv("MSCONV_KERNELS", usable()[-1].name)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory with the kernels, built by two threads of a process and another process at once.  To be
    read, never changed."""
    root = tmp_path_factory.mktemp("built")
    code = """
from concurrent.futures import ThreadPoolExecutor
from msconv_runtime.kernels import library
with ThreadPoolExecutor(2) as pool:
    print({str(pool.submit(library).result().path) for _ in range(2)})
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(root), "MSCONV_COMPILED": "1"}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    said = {process.communicate(timeout=300)[0].strip() for process in running}
    (path,) = (root / "msconv").glob("*.so")
    assert said == {str({str(path)})}
    return root


@pytest.fixture
def kept(built: Path, fresh: Path) -> Path:
    """The path of the built kernels, in a cache directory that the test may change."""
    shutil.copytree(built / "msconv", fresh / "msconv")
    (path,) = (fresh / "msconv").glob("*.so")
    return path


@pytest.fixture(scope="module")
def artifact(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from msconv.steps.compile import compile_graphs

    root = tmp_path_factory.mktemp("compiled") / "artifact"
    convert(checkpoint("bfloat16_shards"), root)
    compile_graphs(root, "cpu")
    return root


def sources(to: Path, old: str, new: str) -> Path:
    """The kernels' sources with something changed."""
    texts = {name: (Path(kernels.__file__).parent / name).read_text() for name in kernels.SOURCES}
    assert any(old in text for text in texts.values())
    for name, text in texts.items():
        (to / name).write_text(text.replace(old, new))
    return to


def test_kernels_are_built_once_and_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By other threads and processes too, which waited for the one build."""
    monkeypatch.setattr(Compiler, "build", lambda *_: pytest.fail("built again"))
    assert library().path == kept


def test_a_truncated_library_is_built_again(kept: Path) -> None:
    """Whoever loads its first half is ended by SIGBUS."""
    os.truncate(kept, kept.stat().st_size // 2)
    done = run_python("from msconv_runtime.kernels import library; print(library().path)")  # it stays loaded
    assert (done.code, done.stdout.strip()) == (0, str(kept)), done.stderr
    assert f"msconv: {kept} is built again: its digest differs" in done.stderr


def test_a_library_is_not_loaded_from_where_others_may_write(kept: Path) -> None:
    kept.parent.chmod(0o777)
    assert library().path is None
    assert (
        f"no place for them: others may write in {kept.parent}, its mode is 0777; XDG_CACHE_HOME" in library().why
    )


def test_nothing_of_the_current_directory_is_run(
    fresh: Path, one: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A build is tried in a process of its own, which imports NumPy."""
    changed = sources(tmp_path, "", "")
    (changed / "kernels.cc").write_text('extern "C" int none;')
    (tmp_path / "numpy.py").write_text("raise SystemExit('of the current directory')")
    monkeypatch.setattr(kernels, "__file__", str(changed / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert library().path is None
    assert "undefined symbol" in library().why


def test_what_computes_something_else_is_not_used(
    fresh: Path, one: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed = sources(tmp_path, "a.best[r] = best;", "a.best[r] = best + 1;")
    monkeypatch.setattr(kernels, "__file__", str(changed / "__init__.py"))
    found = library()
    assert found.path is None
    assert "do not work: Attend of 20 is off by" in found.why
    assert not list((fresh / "msconv").glob("*.so"))


def test_what_does_not_build_says_why(
    fresh: Path, one: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed = sources(tmp_path, "#include <cmath>", "#error an old compiler")
    monkeypatch.setattr(kernels, "__file__", str(changed / "__init__.py"))
    assert library().path is None
    assert "an old compiler" in library().why


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("MSCONV_COMPILED", "0", "MSCONV_COMPILED=0"),
        ("MSCONV_NATIVE", "0", "MSCONV_NATIVE=0"),  # its name before
        (
            "CXX",
            "/no/such/compiler",
            "CXX=/no/such/compiler: No such file or directory; set CXX to a C++ compiler",
        ),
        ("PATH", "/nowhere", "no C++ compiler"),
        ("XDG_CACHE_HOME", "/dev/null/cache", "XDG_CACHE_HOME may name another directory"),
    ],
)
def test_without_kernels_there_is_a_reason(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    assert library().path is None
    assert why in library().why


def test_memory_that_runs_out_is_an_answer(kept: Path) -> None:
    code = """
import resource, sys
import numpy as np
from msconv_runtime.kernels import check, library
path = library().path
x, weight = np.ones((4096, 4096), np.float32), np.ones((64, 4096), np.float32)
check.call(path, "Product", [x[:1024], weight], (1024, 64))  # with its copy of x, 16 MB, which is kept
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), -1))
try:
    check.call(path, "Product", [x, weight], (4096, 64))
except ArithmeticError as e:
    print(e)
"""
    done = run_python(code)
    assert done.stdout.strip() == "Product returned 3", done.stderr


def test_a_part_without_memory_fails_its_call_only(tmp_path: Path) -> None:
    """Other threads still work on the call when one has failed: it ends after them, and the next is whole."""
    program = tmp_path / "parts.cc"
    program.write_text("""
#include <cstdio>
#include <pool.h>
int main() {
  Pool::one().grow(4);
  for (int round = 0; round < 2000; round++) {
    std::atomic<int> ran{0};
    bool failed = false;
    try {
      Pool::one().run(9, [&](int64_t i) {
        ran++;
        if (round % 2 && i == round % 9) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    if (failed != bool(round % 2) || ran != 9) return printf("round %d: %d parts\\n", round, ran.load());
  }
}
""")
    made, here = tmp_path / "parts", str(Path(kernels.__file__).parent)
    subprocess.run(["g++", "-std=c++17", "-O2", "-pthread", f"-I{here}", "-o", made, program], check=True)
    done = subprocess.run([made], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_large_memory_is_kept_for_the_next_that_it_fits_and_not_more_than_so_much(tmp_path: Path) -> None:
    program = tmp_path / "workspace.cc"
    program.write_text("""
#include <cstdio>
#include <workspace.h>
#include <sys/resource.h>
#include <vector>
#define CHECK(truth) if (!(truth)) return printf("line %d: %s\\n", __LINE__, #truth), 1
typedef LargePieces Large;
constexpr size_t MB = 1 << 20;
size_t mapped() {
  FILE* file = fopen("/proc/self/statm", "r");
  size_t pages = 0;
  if (!file || fscanf(file, "%zu", &pages) != 1) exit(2);
  fclose(file);
  return pages * 4096;
}
int main() {
  Large& pieces = Large::one();
  const auto first = pieces.take(5 * MB);
  CHECK(first.bytes == 6 * MB && size_t(first.at) % Large::PAGE == 0);
  pieces.give_back(first);
  const auto larger = pieces.take(7 * MB), much_smaller = pieces.take(2 * MB);
  CHECK(larger.at != first.at && much_smaller.at != first.at);
  CHECK(pieces.take(3 * MB).at == first.at && pieces.take(6 * MB).at != first.at);
  const auto whole = pieces.take(Large::MOST);
  pieces.give_back(first);
  pieces.give_back(pieces.take(Large::MOST + 1));  // more than is kept: what is kept stays
  CHECK(pieces.take(6 * MB).at == first.at);
  pieces.give_back(first);
  pieces.give_back(whole);  // it goes where that is too much
  CHECK(pieces.take(Large::MOST).at == whole.at);
  const size_t before = mapped();
  for (size_t size : {4 * MB, 16 * MB}) {
    std::vector<Large::Piece> many;
    for (int i = 0; i < 40; i++) many.push_back(pieces.take(size));
    CHECK(mapped() >= before + 40 * size);
    for (const auto& piece : many) pieces.give_back(piece);
    CHECK(mapped() <= before + (size == 4 * MB ? 16 * size : Large::MOST));  // so many pieces, or so many bytes
  }
  CHECK(mapped() >= before + Large::MOST);
  rlimit limit{mapped() + 32 * MB, RLIM_INFINITY};
  setrlimit(RLIMIT_AS, &limit);
  const auto instead = pieces.take(60 * MB);  // what is kept is of another size, and is given back for it
  bool failed = false;
  try {
    pieces.take(size_t(1) << 34);
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  CHECK(failed && instead.bytes == 60 * MB);
  Floats few(100), rows(2 * MB);
  CHECK(size_t(few.reserve(0)) % 64 == 0 && size_t(rows.reserve(0)) % Large::PAGE == 0);
  float* at = rows.reserve(MB);
  CHECK(at == rows.reserve(2 * MB));
}
""")
    made, here = tmp_path / "workspace", str(Path(kernels.__file__).parent)
    command = ["g++", "-std=c++17", "-O2", "-Wno-psabi", "-pthread", f"-I{here}", "-o", made]
    subprocess.run([*command, program], check=True)
    done = subprocess.run([made], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_both_ways_give_the_same_logits(artifact: Path) -> None:
    from msconv_runtime import Session

    prompts = [[1, 2, 3], list(range(5, 75)), [9]]
    found = []
    for session in (Session(artifact), Session(artifact, compiled=False)):
        steps = [
            session.prefill(prompts),
            session.decode([4, 5, 6]),
            session.extend([[1], list(range(40)), [2, 3]]),
        ]
        found.append(np.concatenate(steps))
        assert session.graphs.compiles_since_ready == 0
        with pytest.raises(UsageError, match="at least one token"):
            session.extend([[1], [], [2]])
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_a_session_without_kernels_runs_the_other_graphs(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msconv_runtime import Session

    monkeypatch.setattr("msconv_runtime.graphs.library", lambda: Library(None, "no C++ compiler"))
    session = Session(artifact)
    assert sorted(session.graphs.cells) == ["decode", "prefill", "verify"]
    assert session.generate([[1, 2]], 3)


def test_matrices_are_mapped_as_they_are_stored(artifact: Path) -> None:
    from msconv_runtime import Session

    tensors = Session(artifact).graphs.tensors
    types = {name: str(t.dtype) for name, t in tensors.items()}
    assert types["model.layers.0.mlp.down_proj.weight"] == "BFloat16"
    assert types["model.norm.weight"] == "Float32"


def test_a_graph_of_other_kernels_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msconv_runtime.artifact import Artifact

    monkeypatch.setattr("msconv_runtime.mindir_check.LIBRARY", "msconv-native-2")
    with pytest.raises(ArtifactError, match="wants the kernels msconv-native-1; these are msconv-native-2"):
        Graphs(Artifact(artifact), "cpu")


def test_weights_that_would_be_rounded_are_refused(
    checkpoint: Checkpoints, artifact: Path, tmp_path: Path
) -> None:
    """A graph of kernels that was compiled for bfloat16, beside weights converted to float32 since."""
    from msgspec.structs import replace

    from msconv_runtime.artifact import Artifact, read_manifest, write_manifest

    root = tmp_path / "wider"
    convert(checkpoint("bfloat16_shards"), root, dtype="float32")
    shutil.copytree(artifact / "graphs", root / "graphs")
    manifest = replace(read_manifest(root), graphs=read_manifest(artifact).graphs)
    write_manifest(root, manifest)
    with pytest.raises(ArtifactError, match="of another shape or type"):
        Graphs(Artifact(root, manifest), "cpu")


def test_threads_are_the_share_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Handle:
        def Threads(self, count: Any) -> None:
            told.append(count.value)

    monkeypatch.setattr(kernels, "library", lambda: Library(Path("x"), handle=Handle()))  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "processors_allowed", lambda: 8)
    for ranks, limit in ((1, ""), (3, ""), (16, ""), (1, "4"), (4, "4"), (1, "0"), (1, "many")):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        kernels.use_threads(ranks)
    assert told == [8, 2, 1, 4, 2, 8, 8]


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_a_containers_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], allowed: int
) -> None:
    monkeypatch.setattr(kernels, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert kernels.processors_allowed() == allowed


def test_the_check_covers_every_operation() -> None:
    text = "".join((Path(kernels.__file__).parent / name).read_text() for name in kernels.UNITS)
    operations = {line.split("(")[1].split(")")[0] for line in text.splitlines() if line.startswith("OPERATION(")}
    tried = {name.partition(" ")[0] for name in check.examples(np.random.default_rng(0))}
    assert operations == tried != set()

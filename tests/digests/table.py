"""Digests of all that is made for small models: `python -m tests.digests.table > tests/digests/table.json`.

table.json was made by the code of 07fe90e, the last one before the names of things in an artifact changed: what is
compared with it is what that code made of the same checkpoints.  Cases of int8 and EAGLE3 are from later code.
Only the command line and the files are used, so that this script runs on old code and new.  With a directory as
argument, the artifacts are left there.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import xxhash

from tests.digests.models import MODELS, write_model

Entries = dict[str, str]  # {what: digest}

TARGETS = ("cpu", "ascend910b", "ascend310p")  # ascend910c's graphs are ascend910b's
RENAMED = {"native": "mixed_compiled", "decode_all": "verify"}  # graphs of format 1: their phase, now their name
LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))


@dataclass(frozen=True)
class Case:
    """A model in a layout, and the targets that it is compiled for.  `dtype`: "" takes the checkpoint's own.
    `quant`: what matrices are quantised to, "" for nothing."""

    model: str
    tp: int
    ep: int = 1
    dtype: str = ""
    targets: tuple[str, ...] = TARGETS
    quant: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.model, f"tp {self.tp}", f"ep {self.ep}", self.dtype, self.quant]))


QUICK = (  # every model, every graph of every target, and every kind of cut: for each run of the tests
    Case("qwen3", 2, targets=("cpu", "ascend910b")),
    Case("qwen3 tied", 1, targets=("cpu",)),
    Case("qwen3 yarn", 1, targets=("ascend310p",)),
    Case("qwen3 bias", 4, targets=("ascend910b",)),
    Case("qwen3_moe", 4, 2, targets=("cpu", "ascend910c")),
    Case("deepseek_v3", 2, 2, targets=("cpu",)),
    Case("deepseek_v3 fp8", 2, 1, "float16", targets=("ascend310p",)),
    Case("deepseek_v3 fp8", 4, 4, targets=()),
    Case("qwen3_moe", 4, 2, targets=("cpu", "ascend910b"), quant="w8a8"),
    Case("deepseek_v3 draft", 2, 2, targets=("ascend910b",)),
    Case("eagle3", 2, targets=("ascend910b",)),
)
OF_BEFORE = tuple(model for model in MODELS if model not in ("deepseek_v3 draft", "eagle3"))
ALL = (
    *QUICK,
    *(Case("qwen3", tp) for tp in (1, 2, 4, 8)),
    *(Case(model, tp) for model in ("qwen3 tied", "qwen3 yarn", "qwen3 bias") for tp in (1, 2)),
    *(Case(model, *layout) for model in ("qwen3_moe", "deepseek_v3") for layout in LAYOUTS),
    *(Case("deepseek_v3 fp8", *layout, targets=()) for layout in LAYOUTS),
    *(Case("deepseek_v3 fp8", 2, 2, targets=(target,)) for target in TARGETS),
    *(Case(model, 2, 1, dtype, ("cpu",)) for model in OF_BEFORE for dtype in ("float16", "float32")),
    Case("deepseek_v3 draft", 2, 1, targets=("cpu", "ascend910c")),
    Case("eagle3", 1, targets=("cpu", "ascend310p")),
    Case("deepseek_v3 draft", 2, 1, "float16", targets=("ascend310p",)),
    Case("qwen3 bias", 2, targets=("cpu", "ascend910b"), quant="w8a8"),
    Case("deepseek_v3 fp8", 2, 2, targets=("cpu", "ascend910b"), quant="w8a8"),
)


def digests_of(case: Case, work: Path) -> Entries:
    """What is made in a case.  `work` keeps the checkpoints and the artifact."""
    model, out = work / "models" / case.model.replace(" ", "-"), work / case.name.replace(" ", "-")
    if not model.exists():
        write_model(model, case.model)
    options = [*(["--dtype", case.dtype] if case.dtype else []), *(["--quant", case.quant] if case.quant else [])]
    options += ["--no-drafts"] if case.model in ("deepseek_v3", "deepseek_v3 fp8") else []  # as of before
    if not out.exists():
        msconv("convert", "--model", model, "--tp", case.tp, "--ep", case.ep, "--output", out, *options)
    for target in case.targets:
        msconv("compile", out, "--target", target)
    return {
        **{f"checkpoint {path.name}": digest(path.read_bytes()) for path in sorted(model.iterdir())},
        **weights(out, case.tp),
        **graphs(out, case.targets),
    }


def msconv(*args: object) -> None:
    """A command, in this process.  It must succeed."""
    from msconv.cli import cli

    with redirect_stdout(sys.stderr):
        code = cli.main([*map(str, args)], prog_name="msconv", standalone_mode=False)
    assert not code, f"{args}: exit code {code}"


def weights(artifact: Path, tp: int) -> Entries:
    """A line for each tensor with its digest on every rank; and one for each file, whose header is in it too."""
    found: dict[str, list[str]] = {}
    for rank in range(tp):
        for path in sorted((artifact / "weights").glob(f"model-rank-{rank}-part-*.safetensors")):
            data = path.read_bytes()
            found[f"file {path.name}"] = [digest(data)]
            for name, tensor in tensors(data):
                found.setdefault(f"tensor {name}", []).append(digest(tensor))
    return {name: " ".join(of_ranks) for name, of_ranks in sorted(found.items())}


def tensors(data: bytes) -> Iterable[tuple[str, bytes]]:
    """Names and bytes in a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, data[begin:end]


def graphs(artifact: Path, targets: tuple[str, ...]) -> Entries:
    """A line for each graph, under the name that it has today; and for the MindSpore that made a target's graphs:
    another one makes other bytes."""
    found = {}
    for target in targets:
        for path in sorted((artifact / "graphs" / target).glob("*.mindir")):
            found[f"graph {target}/{RENAMED.get(path.stem, path.stem)}"] = digest(path.read_bytes())
    for entry in json.loads((artifact / "msconv.json").read_text()).get("graphs", ()):
        if entry["target"] in targets:
            found[f"graph {entry['target']}/mindspore"] = entry["mindspore"]
    return found


def digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def differences(case: Case, table: Entries, found: Entries) -> list[str]:
    """What is not as the table has it: a line each.  The table may have graphs of other targets too."""
    taken = ("checkpoint ", "file ", "tensor ", *(f"graph {target}/" for target in case.targets))
    expected = {name: value for name, value in table.items() if name.startswith(taken)}
    problems = [f"{case.name}: {name}: not in the table" for name in found.keys() - expected.keys()]
    problems += [f"{case.name}: {name}: is not made any more" for name in expected.keys() - found.keys()]
    for name in expected.keys() & found.keys():
        old, new = expected[name].split(), found[name].split()
        ranks = [str(i) for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        if ranks or len(old) != len(new):
            of = f" of rank {', '.join(ranks)}" if name.startswith("tensor ") else ""
            problems.append(f"{case.name}: {name}{of}: other bytes than in the table")
    return sorted(problems)


def main() -> None:
    """Print the table."""
    table: dict[str, Entries] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(sys.argv[1] if len(sys.argv) > 1 else directory)
        for case in dict.fromkeys(ALL):
            print(case.name, ", ".join(case.targets), file=sys.stderr)
            table.setdefault(case.name, {}).update(digests_of(case, work))
    print(json.dumps(table, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()

"""Thousands of damaged headers, indexes and configurations: each is refused in words or read as it is."""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import shutil
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.checkpoint.directory import Checkpoint, open_checkpoint
from msconv.layout.cuts import Mesh
from msconv.layout.planning import make_plan
from msconv.steps.conversion import run
from msconv_runtime.errors import MsconvError
from tests.checkpoints import read_rank
from tests.commands import run_command
from tests.conversions import prepare
from tests.synthetic import describe, qwen3_config, qwen3_shapes

pytestmark = pytest.mark.slow

CASES = 6000
SECONDS = 5.0  # for one case
GROWTH = 300 << 20
ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
CONFIG = qwen3_config()
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

Json = Any
Text = bytes

# What is put where something else was


NUMBERS: list[Json] = [
    *(0, -0.0, 1, -1, 2, 3, 7, 8, 1.5, 2.0, 1e300, -(2**63), 2**31, 2**32, 2**53, 2**62 - 1, 2**62),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**127, 10**400, float("nan"), float("inf"), -float("inf")),
]
STRINGS: list[Json] = [
    *("", " ", "\0", "a\0b", "../x", "/etc/passwd", "..\\x", "a/b", "\ud800", "\udfff\ud800", "\u202e", "\ufeff"),
    *("model.safetensors", "x" * 1024, "x" * 5000, "{}", "{0}", "{layer}", "%s", "a.0.b", ".".join("0" * 400)),
    *("1" * 5000, "٣.٣", "²", "model.layers.99999999999999999999.mlp.up_proj.weight", "__metadata__", "\n", "ﬀ"),
    *(
        "BF16",
        "F32",
        "F16",
        "F64",
        "I64",
        "U8",
        "BOOL",
        "F8_E4M3",
        "F4",
        "bf16",
        "BF16 ",
        "C64",
        "Qwen3ForCausalLM",
    ),
    *("yarn", "linear", "dynamic", "bfloat16", "float128", "lm_head.weight", "model.norm.weight"),
    "model.layers.0.self_attn.rotary_emb.inv_freq",
]
OTHERS: list[Json] = [None, True, False, [], {}, [[]], [None], {"": None}, [0, 0], [1, 2, 3], ["BF16"], {"a": {}}]


def nested(rng: random.Random) -> Json:
    """Lists or objects in each other, around the depth that Python can follow."""
    value: Json = rng.choice(NUMBERS)
    for _ in range(rng.choice([3, 50, 800, 900, *range(940, 1000, 7)])):
        value = [value] if rng.random() < 0.9 else {"a": value}
    return value


def anything(rng: random.Random) -> Json:
    kind = rng.random()
    if kind < 0.02:
        return nested(rng)
    return rng.choice(NUMBERS if kind < 0.45 else STRINGS if kind < 0.75 else OTHERS)


def dumps(value: Json) -> Text:
    """JSON, as Python writes it; what is nested too deeply for that is written by hand."""
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 2000 + b"]" * 2000


# Mutations of the parsed JSON


def edit_anywhere(rng: random.Random, value: Json) -> Json:
    """Replace, remove, rename, repeat or exchange something, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        out, key = dict(value), rng.choice(list(value))
        how = rng.random()
        if how < 0.6:
            out[key] = edit_anywhere(rng, value[key])
        elif how < 0.7:
            del out[key]
        elif how < 0.8:
            out[str(rng.choice(STRINGS))] = out.pop(key)
        elif how < 0.9:
            out[str(rng.choice(STRINGS))] = rng.choice([out[key], anything(rng)])
        else:
            other = rng.choice(list(value))
            out[key], out[other] = out[other], out[key]
        return out
    if isinstance(value, list) and value and rng.random() < 0.85:
        items, at = list(value), rng.randrange(len(value))
        how = rng.random()
        if how < 0.6:
            items[at] = edit_anywhere(rng, value[at])
        elif how < 0.7:
            del items[at]
        elif how < 0.8:
            items.insert(at, rng.choice(NUMBERS))
        elif how < 0.9:
            items.reverse()
        else:
            items = items * rng.choice([2, 5, 100])
        return items
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, -2, 2, 8, -8, 2**32, -(2**32), 2**62, 2**64, -value, value])
    return anything(rng)


def edit_entry(rng: random.Random, header: Json) -> Json:
    """One tensor's entry: places that overlap, shapes that lie, other types."""
    out = json.loads(json.dumps(header))
    name, other = rng.choice(list(out)), rng.choice(list(out))
    entry = out[name]
    begin, end = entry["data_offsets"]
    how = rng.randrange(10)
    if how == 0:
        entry["data_offsets"] = out[other]["data_offsets"]
    elif how == 1:
        shift = rng.choice([-2, -1, 1, 2, 16, -begin, 2**31, 2**63, -(2**63)])
        entry["data_offsets"] = [begin + shift, end + shift]
    elif how == 2:
        entry["data_offsets"] = [end, begin]
    elif how == 3:
        entry["data_offsets"] = [begin + rng.choice(NUMBERS), end]
    elif how == 4:
        entry["dtype"] = rng.choice(
            ["F16", "BF16", "I16", "U16", "F32", "F64", "U8", "F8_E5M2", "BOOL", "F6", "bf16"]
        )
    elif how == 5:
        entry["shape"] = entry["shape"][::-1]
    elif how == 6:
        entry["shape"] = [math.prod(entry["shape"])]
    elif how == 7:
        entry["shape"] = rng.choice(
            [[2**31, 2**31, 4], [2**62, 4], [0, 2**62], [2**64], [1] * 8, [1] * 9, [-1, -1]]
        )
    elif how == 8:
        entry["shape"] = [1, *entry["shape"]]
    else:
        entry["dtype"] = {"F": "BF16"}.get(rng.choice("FG"), "F16")
        out[other]["dtype"] = rng.choice(["F16", "BF16"])
    return out


def rename(rng: random.Random, header: Json) -> Json:
    """A tensor under a strange name, in its old place."""
    name = rng.choice(list(header))
    strange = str(rng.choice(STRINGS)) if rng.random() < 0.6 else name + rng.choice("\0/\\.{}٣\ud800 ")
    return {strange if n == name else n: entry for n, entry in header.items()}


# Mutations of bytes


def edit_bytes(rng: random.Random, text: Text) -> Text:
    out = bytearray(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 30])):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(6)
        if how == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            out[at : at + rng.choice([1, 2, 10])] = b""
        elif how == 2:
            out[at:at] = rng.choice(
                [b"\xff", b"\0", b"\xed\xa0\x80", b"\xc0\x80", b"\xef\xbb\xbf", b'"', b"}", b"[" * 999]
            )
        elif how == 3:
            out[at:at] = rng.choice(
                [b"-", b"e9", b"0", b".5", b"9" * 5000, b"NaN", b"\\ud800", b"\\u0000", b"//", b","]
            )
        elif how == 4:
            piece = bytes(out[at : at + rng.choice([1, 20, 200])])
            out[at:at] = piece
        else:
            out[at:] = out[at : at + rng.randrange(1, 40)]
            break
    return bytes(out) or b"{"


def twice(rng: random.Random, value: dict[str, Json]) -> Text:
    """A key that is there twice, maybe spelled with an escape the second time."""
    key = rng.choice(list(value))
    spelled = json.dumps(key)
    if rng.random() < 0.5 and key:
        spelled = '"' + "".join(f"\\u{ord(c):04x}" for c in key) + '"'
    text = dumps(value)
    return text[:-1] + b", " + spelled.encode() + b": " + dumps(rng.choice([value[key], anything(rng)])) + b"}"


# Cases


class Case:
    """A checkpoint of two shards, index and configuration, one or two of which are then changed."""

    def __init__(self, rng: random.Random) -> None:
        shapes = qwen3_shapes(CONFIG)
        names = list(shapes)
        halves = [{n: shapes[n] for n in part} for part in (names[:7], names[7:])]
        made = [describe(half, "BF16") for half in halves]
        self.rng = rng
        self.headers: list[dict[str, Json]] = [json.loads(header) for header, _ in made]
        self.texts = [header for header, _ in made]
        self.lengths: list[int | None] = [None, None]
        self.data = [np.random.default_rng(i).bytes(size) for i, (_, size) in enumerate(made)]
        self.index: dict[str, Json] = {
            "metadata": {"total_size": sum(size for _, size in made)},
            "weight_map": {n: SHARDS[i] for i, half in enumerate(halves) for n in half},
        }
        self.index_text = dumps(self.index)
        self.config_text = dumps(CONFIG)

    def damage(self) -> str:
        """Change something.  Its name."""
        rng, at = self.rng, self.rng.randrange(2)
        header = self.headers[at]
        how = rng.choice(MUTATIONS)
        if how == "header bytes":
            self.texts[at] = edit_bytes(rng, self.texts[at])
        elif how == "header json":
            self.texts[at] = dumps(edit_anywhere(rng, header))
        elif how == "header entry":
            self.texts[at] = dumps(edit_entry(rng, header))
        elif how == "header name":
            self.texts[at] = dumps(rename(rng, header))
        elif how == "header twice":
            self.texts[at] = twice(rng, header)
        elif how == "header order":
            self.texts[at] = dumps(dict(rng.sample(list(header.items()), len(header))))
        elif how == "header metadata":
            self.texts[at] = dumps({"__metadata__": rng.choice([anything(rng), {"format": "pt"}]), **header})
        elif how == "length":
            n = len(self.texts[at])
            choices = [
                0,
                1,
                2,
                n - 1,
                n + 1,
                n + len(self.data[at]),
                2**31,
                2**32 + n,
                2**63,
                2**64 - 1,
                2**64 - 8,
            ]
            self.lengths[at] = rng.choice([*choices, rng.randrange(2 * n)])
        elif how == "data":
            cut = rng.choice([1, 2, 100, len(self.data[at])])
            self.data[at] = rng.choice([self.data[at][:-cut], self.data[at] + bytes(cut), b""])
        elif how == "index bytes":
            self.index_text = edit_bytes(rng, self.index_text)
        elif how == "index json":
            self.index_text = dumps(edit_anywhere(rng, self.index))
        elif how == "index map":
            changed = edit_anywhere(rng, self.index["weight_map"])
            self.index_text = dumps({"weight_map": changed})
        elif how == "index twice":
            self.index_text = b'{"weight_map": ' + twice(rng, self.index["weight_map"]) + b"}"
        elif how == "config bytes":
            self.config_text = edit_bytes(rng, self.config_text)
        elif how == "config twice":
            self.config_text = twice(rng, CONFIG)
        else:
            self.config_text = dumps(edit_config(rng))
        return how

    def write(self, directory: Path) -> None:
        for i, name in enumerate(SHARDS):
            length = len(self.texts[i]) if self.lengths[i] is None else self.lengths[i]
            (directory / name).write_bytes(struct.pack("<Q", length) + self.texts[i] + self.data[i])
        (directory / INDEX).write_bytes(self.index_text)
        (directory / "config.json").write_bytes(self.config_text)


def edit_config(rng: random.Random) -> Json:
    if rng.random() < 0.1:
        return edit_anywhere(rng, CONFIG)
    out: dict[str, Json] = dict(CONFIG)
    for _ in range(rng.choice([1, 1, 2, 4])):
        key = rng.choice(
            [*CONFIG, "rope_scaling", "rope_parameters", "layer_types", "quantization_config", "dtype"]
        )
        if rng.random() < 0.2:
            out.pop(key, None)
        elif key.startswith("rope_") and rng.random() < 0.7:
            parts = ("rope_type", "type", "factor", "rope_theta", "attention_factor", "beta_fast", "mscale")
            parts += ("original_max_position_embeddings", "truncate", "partial_rotary_factor")
            kind = {"rope_type": rng.choice(["yarn", "linear", "default"])}
            out[key] = {**kind, **{k: anything(rng) for k in rng.sample(parts, 3)}}
        else:
            out[key] = anything(rng)
    return out


MUTATIONS = [
    *("header bytes", "header json", "header entry", "header name", "header twice", "header order"),
    *("header metadata", "length", "data", "index bytes", "index json", "index map", "index twice"),
    *("config bytes", "config json", "config json", "config twice"),
]


def check_accepted(directory: Path, opened: Checkpoint) -> None:
    """What was read is what safetensors reads, or, if that is stricter, what the file holds by definition."""
    from safetensors import SafetensorError, safe_open

    for name, file in opened.files.items():
        data = file.path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        ours = {n: t for n, t in opened.tensors.items() if t.file == name}
        assert set(ours) == set(header)
        for tensor, info in ours.items():
            assert list(info.shape) == header[tensor]["shape"]
            assert [info.offset - 8 - length, info.offset + info.nbytes - 8 - length] == header[tensor][
                "data_offsets"
            ]
        try:
            with safe_open(file.path, "np") as f:
                assert set(f.keys()) == set(ours)
                for tensor, info in ours.items():
                    if info.dtype != "bfloat16":
                        stored = np.frombuffer(data[info.offset : info.offset + info.nbytes], info.dtype)
                        assert np.array_equal(f.get_tensor(tensor).ravel(), stored, equal_nan=True)
        except SafetensorError:
            pass


def check_converted(directory: Path, opened: Checkpoint, out: Path) -> None:
    """The one rank of a conversion holds the tensors as they are."""
    shutil.rmtree(out, ignore_errors=True)
    run(prepare(directory, 1, output=out))
    found = {n: t.bits.tobytes() for n, t in read_rank(out, 0).items()}

    def stored(*names: str) -> bytes:
        pieces = []
        for name in names:
            info = opened.tensors[name]
            data = (directory / info.file).read_bytes()
            pieces.append(data[info.offset : info.offset + info.nbytes])
        return b"".join(pieces)

    for name, data in found.items():
        if "qkv_proj" in name:
            expected = stored(*(name.replace("qkv", part) for part in "qkv"))
        elif "gate_up_proj" in name:
            expected = stored(name.replace("gate_up", "gate"), name.replace("gate_up", "up"))
        else:
            expected = stored(name)
        assert data == expected, name


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def fuzz(seed: int, directory: Path) -> dict[str, Any]:
    """All cases of a seed.  What each kind ended in, and whatever is not allowed to happen."""
    rng = random.Random(seed)
    source, out = directory / "model", directory / "out"
    source.mkdir()
    Case(rng).write(source)
    check_converted(source, open_checkpoint(source), out)
    base = previous = peak_bytes()
    ends: Counter[str] = Counter()
    problems: list[str] = []
    for number in range(CASES):
        case = Case(random.Random(f"{seed} {number}"))
        kinds = [case.damage() for _ in range(case.rng.choice([1, 1, 1, 2]))]
        case.write(source)
        kind = " + ".join(kinds)
        tp = case.rng.choice([1, 2, 3, 2**20])
        begun = time.monotonic()
        try:
            opened = open_checkpoint(source)
            make_plan(opened.family.table, opened.config.sizes(), opened.tensors, Mesh(tp))
            check_accepted(source, opened)
            if ends["accepted"] % 10 == 0:
                check_converted(source, opened, out)
            ends["accepted"] += 1
        except MsconvError as e:
            ends[e.code] += 1
            if len(e.message) > 4000 or not e.message.replace("\n", "").isprintable():
                problems.append(f"case {number} ({kind}): a message nobody can read: {e.message[:300]!r}")
        except BaseException as e:
            problems.append(f"case {number} ({kind}): {type(e).__name__}: {str(e)[:300]}")
        seconds = time.monotonic() - begun
        if seconds > SECONDS:
            problems.append(f"case {number} ({kind}): took {seconds:.1f} s")
        if peak_bytes() - previous > 50 << 20:
            problems.append(f"case {number} ({kind}): took {(peak_bytes() - previous) >> 20} MiB")
            previous = peak_bytes()
    return {"ends": ends, "problems": problems, "growth": peak_bytes() - base}


def main(seed: str, directory: str) -> None:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: a hang does not outlive the test
    print(json.dumps(fuzz(int(seed), Path(directory))))


def in_a_process(function: str, *arguments: object, timeout: float = 300) -> dict[str, Any]:
    """A function of this module in a process of its own, of bounded size."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.checkpoint.test_fuzz import {function} as function\n"
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "function(*sys.argv[1:])"
    )
    done = run_command([sys.executable, "-c", code, *map(str, arguments)], None, timeout)
    assert done.code == 0, done.stderr[-2000:]
    return done.json


def test_every_damaged_checkpoint_is_refused_in_words_or_read_as_it_is(tmp_path: Path) -> None:
    """MSCONV_FUZZ_SEED repeats a run."""
    seed = int(os.environ.get("MSCONV_FUZZ_SEED") or random.randrange(1 << 32))
    print(f"MSCONV_FUZZ_SEED={seed}")
    done = in_a_process("main", seed, tmp_path)
    print(done["ends"])
    assert not done["problems"], f"seed {seed}, {len(done['problems'])} cases:\n" + "\n".join(
        done["problems"][:30]
    )
    assert done["growth"] < GROWTH
    ends = done["ends"]
    assert sum(ends.values()) == CASES
    assert ends["accepted"] > CASES // 50  # or the cases are too wild to find anything
    assert ends["checkpoint"] > CASES // 4
    assert ends["plan"] > CASES // 50


# Large ones, one at a time


RUBBISH: dict[str, bytes] = {
    "lists": b"[],",
    "objects": b"{},",
    "numbers": b"1.5,",
    "strings": b'"ab",',
    "digits": b"7" * 4000 + b",",
    "deep lists": b"[" * 100 + b"]" * 100 + b",",
}


def rubbish(path: str, where: str, unit: str) -> None:
    """Read a file of that much of the same, just below the largest that is looked at."""
    room = (32 << 20) - 100
    target = Path(path)
    before, after = {
        "shape": (b'{"a": {"dtype": "F32", "data_offsets": [0, 4], "shape": [', b"0]}}"),
        "names": (b'{"a": [', b"0]}"),
        "metadata": (b'{"__metadata__": {"a": [', b"0]}}"),
        "index": (b'{"weight_map": {"a": [', b"0]}}"),
        "config": (b'{"architectures": ["Qwen3ForCausalLM"], "layer_types": [', b"0]}"),
    }[where]
    text = before + RUBBISH[unit] * (room // len(RUBBISH[unit])) + after
    if where in ("index", "config"):
        name = INDEX if where == "index" else "config.json"
        (target / name).write_bytes(text)
    else:
        (target / SHARDS[0]).write_bytes(struct.pack("<Q", len(text)) + text)
    del text
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base, begun, word = peak_bytes(), time.monotonic(), "accepted"
    try:
        open_checkpoint(target)
    except MsconvError as e:
        word = e.code
    print(json.dumps({"end": word, "growth": peak_bytes() - base, "seconds": time.monotonic() - begun}))


@pytest.mark.parametrize(
    ("where", "unit"),
    [
        *(("shape", unit) for unit in RUBBISH),
        *((where, "lists") for where in ("names", "metadata", "index", "config")),
    ],
)
def test_megabytes_of_rubbish_take_little_memory_and_time(tmp_path: Path, where: str, unit: str) -> None:
    Case(random.Random(0)).write(tmp_path)
    done = in_a_process("rubbish", tmp_path, where, unit)
    assert done["end"] == "checkpoint"
    assert done["growth"] < GROWTH
    assert done["seconds"] < 4 * SECONDS  # for a machine that has other things to do


def huge(path: str, length: str) -> None:
    target = Path(path)
    with (target / SHARDS[0]).open("r+b") as f:
        f.write(struct.pack("<Q", int(length)))
        f.truncate(1 << 43)  # sparse: the file may well be as long as that
    base, begun, word = peak_bytes(), time.monotonic(), "accepted"
    try:
        open_checkpoint(target)
    except MsconvError as e:
        word = e.code
    print(json.dumps({"end": word, "growth": peak_bytes() - base, "seconds": time.monotonic() - begun}))


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_more_than_there_is_takes_no_memory(tmp_path: Path, length: int) -> None:
    Case(random.Random(0)).write(tmp_path)
    done = in_a_process("huge", tmp_path, length)
    assert done["end"] == "checkpoint"
    assert done["growth"] < 10 << 20
    assert done["seconds"] < 1


# Found by the fuzz


def check_refused(directory: Path) -> None:
    with pytest.raises(MsconvError) as caught:
        open_checkpoint(directory)
    assert len(caught.value.message) < 4000
    assert caught.value.message.replace("\n", "").isprintable()


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "hidden_size", "vocab_size"])
def test_a_number_beyond_every_float_is_refused(tmp_path: Path, key: str) -> None:
    case = Case(random.Random(0))
    case.config_text = dumps(CONFIG | {key: 10**400})
    case.write(tmp_path)
    check_refused(tmp_path)


@pytest.mark.parametrize("opening", ["[", '{"a": '])
@pytest.mark.parametrize("place", ["hidden_size", "hidden_act", "rope_theta", "shape", "dtype", "weight_map"])
def test_nesting_of_any_depth_is_refused(tmp_path: Path, place: str, opening: str) -> None:
    """Up to where the parser stops, and what the message makes of the value must not go deeper."""
    for depth in [10, 500, *range(800, 1010)]:
        case = Case(random.Random(0))
        closing = {"[": "]"}.get(opening, "}")
        value = (opening * depth + "0" + closing * depth).encode()
        if place == "weight_map":
            name = b'"model.norm.weight": '
            case.index_text = case.index_text.replace(name + dumps(SHARDS[1]), name + value)
        elif place in ("shape", "dtype"):
            entry = case.headers[0]["model.embed_tokens.weight"]
            case.texts[0] = case.texts[0].replace(dumps(entry[place]), value, 1)
        else:
            case.config_text = dumps(CONFIG | {place: "here"}).replace(b'"here"', value)
        case.write(tmp_path)
        check_refused(tmp_path)


@pytest.mark.parametrize("text", ["\ufeff", "\udfff\ud800", "\u202e", "a\nb\0"])
@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_an_error_shows_strange_text_in_readable_letters(tmp_path: Path, key: str, text: str) -> None:
    case = Case(random.Random(0))
    case.headers[0]["model.embed_tokens.weight"][key] = text
    case.texts[0] = dumps(case.headers[0])
    case.write(tmp_path)
    check_refused(tmp_path)

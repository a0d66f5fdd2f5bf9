"""Whole conversions of models with experts: every bit in its place, from any type, in any layout, or an error."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import msconv.stream.execute as streaming
from msconv.convert import Converted, prepare, run
from msconv.reshard import prepare as prepare_reshard
from msconv.stream.blocks import buffer_sizes
from msconv_runtime.artifact import TensorEntry, Weights, read_manifest
from msconv_runtime.errors import ArtifactError, CheckpointError, MsconvError, PlanError
from msconv_runtime.integrity import check_artifact
from tests.checkpoints import (
    BITS,
    Bits,
    Stored,
    edit_json,
    read_checkpoint,
    read_rank,
    read_safetensors,
    write_safetensors,
)
from tests.commands import Result, run_command, run_msconv
from tests.conversions import config_of, convert
from tests.moe_checkpoints import (
    SMALL_DEEPSEEK_V3,
    SMALL_QWEN3_MOE,
    Block,
    add_mtp,
    dequantise,
    quantise_fp8,
    widen,
)
from tests.published import deepseek_v3, qwen3_moe, shard_name, write_index, write_sparse
from tests.stream.faults import Fault
from tests.synthetic import digests, qwen3_config, write_synthetic

FAULTS = Path(__file__).parent / "faults.py"
MESHES = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
BLOCK = (16, 40)  # divides few of the sizes
NUMPY: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Tensors = dict[str, Stored]

QWEN = SMALL_QWEN3_MOE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "decoder_sparse_step": 1,
    "vocab_size": 203,
}
DEEPSEEK = SMALL_DEEPSEEK_V3 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 56,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 203,
}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Bytes may stay in the page cache: what power cuts do is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda fd: None)
        yield


# Checkpoints


def random_checkpoint(
    directory: Path, config: dict[str, Any], code: str = "BF16", shards: int = 1, seed: int = 0, **other: str
) -> Path:
    """Random values under the published names.  `other`: type codes by the end of a name, dots as underscores."""
    build = deepseek_v3 if "kv_lora_rank" in config else qwen3_moe
    rng = np.random.default_rng(seed)
    files: list[Tensors] = [{} for _ in range(shards)]
    for name, (published, shape) in build(config).items():
        kind = "F32" if published == "F32" else code
        for end, wanted in other.items():
            if name.replace(".", "_").endswith(end):
                kind = wanted
        values = rng.normal(0, 0.5, shape).astype(np.float32)
        files[rng.integers(shards)][name] = Stored(kind, narrow(values, kind))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_files(directory, files)
    return directory


def narrow(values: Bits, code: str) -> Bits:
    """Values as the bits of a type."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    return values.astype(kinds[code]).view(BITS[code])


def write_files(directory: Path, files: list[Tensors]) -> None:
    index: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        name = shard_name(number, len(files))
        write_safetensors(directory / name, tensors)
        index |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        write_index(directory, index, sum(t.bits.nbytes for file in files for t in file.values()))


def make_qwen(directory: Path) -> Path:
    """Routers in float32, all else in bfloat16."""
    return random_checkpoint(directory, QWEN, shards=3, mlp_gate_weight="F32")


def make_deepseek(directory: Path) -> Path:
    return random_checkpoint(directory, DEEPSEEK, "F32", shards=2)


def make_fp8(directory: Path) -> Path:
    """FP8 with multi-token prediction, and each scale in another shard than its tensor."""
    plain = random_checkpoint(directory.with_name("plain"), DEEPSEEK)
    return add_mtp(quantise_fp8(plain, directory, BLOCK, shards=3))


KINDS: dict[str, tuple[Callable[[Path], Path], str | None]] = {  # the checkpoint, and --dtype
    "qwen3_moe": (make_qwen, None),
    "qwen3_moe as float16": (make_qwen, "float16"),
    "deepseek float32": (make_deepseek, None),
    "deepseek FP8": (make_fp8, None),
    "deepseek FP8 as float16": (make_fp8, "float16"),
    "deepseek FP8 as float32": (make_fp8, "float32"),
}
RESHARDED = ("qwen3_moe", "deepseek float32", "deepseek FP8")
Models = Callable[[str], Path]
Artifacts = Callable[[str, int, int], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """`model("deepseek FP8")`: its checkpoint, made once.  To be read, never changed."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def make(kind: str) -> Path:
        maker = KINDS[kind][0]
        directory = root / maker.__name__ / "model"
        return directory if directory.exists() else maker(directory)

    return make


@pytest.fixture(scope="module")
def artifact(model: Models, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """`artifact("deepseek FP8", tp, ep)`: converted directly, once.  To be read, never changed."""
    root = tmp_path_factory.mktemp("artifacts")

    @cache
    def make(kind: str, tp: int, ep: int) -> Path:
        out = root / f"{list(KINDS).index(kind)}-{tp}-{ep}"
        convert(model(kind), out, tp, ep=ep, dtype=KINDS[kind][1])
        return out

    return make


@pytest.fixture
def own_artifact(artifact: Artifacts, tmp_path: Path) -> Artifacts:
    """The same, copied: the test may change it."""

    def copy(kind: str, tp: int, ep: int) -> Path:
        return Path(shutil.copytree(artifact(kind, tp, ep), tmp_path / f"own-{tp}-{ep}"))

    return copy


# What each rank must hold, from the source alone


class Reference:
    """A rank's tensors, cut out of the whole checkpoint with numpy."""

    def __init__(self, model: Path, tp: int, ep: int, dtype: str, block: Block = BLOCK) -> None:
        self.source, self.config = read_checkpoint(model), config_of(model)
        self.tp, self.ep, self.dtype, self.block = tp, ep, dtype, block

    def value(self, name: str) -> Bits:
        """The bits of a source tensor in the artifact's type."""
        stored = self.source[name]
        if stored.code == CODES[self.dtype]:
            return stored.bits
        values = widen(stored)
        if stored.code == "F8_E4M3":
            values = dequantise(stored.bits, self.source[name + "_scale_inv"].bits, self.block)
        return narrow(values, CODES[self.dtype])

    def rank(self, rank: int) -> Tensors:
        c, tp, ep = self.config, self.tp, self.ep
        out: Tensors = {}

        def put(name: str, bits: Bits) -> None:
            out[name] = Stored(CODES[self.dtype], bits)

        def rows(name: str, ways: int = tp, mine: int = rank) -> Bits:
            bits = self.value(name)
            assert len(bits) % ways == 0
            return np.split(bits, ways)[mine]

        def cols(name: str, ways: int = tp, mine: int = rank) -> Bits:
            return np.split(self.value(name), ways, axis=1)[mine]

        def vocabulary(name: str) -> None:
            bits = self.value(name)
            each = math.ceil(len(bits) / tp)
            padded = np.concatenate([bits, np.zeros((each * tp - len(bits), bits.shape[1]), bits.dtype)])
            put(name, padded[rank * each : (rank + 1) * each])

        def mlp(prefix: str) -> None:
            gate, up = rows(prefix + "gate_proj.weight"), rows(prefix + "up_proj.weight")
            put(prefix + "gate_up_proj.weight", np.concatenate([gate, up]))
            put(prefix + "down_proj.weight", cols(prefix + "down_proj.weight"))

        def experts(prefix: str, count: int) -> None:
            share, group = tp // ep, rank // (tp // ep)
            gate_up, down = [], []
            for i in range(group * count // ep, (group + 1) * count // ep):
                gate, up = (rows(f"{prefix}{i}.{n}_proj.weight", share, rank % share) for n in ("gate", "up"))
                gate_up.append(np.concatenate([gate.T, up.T], axis=1))
                down.append(cols(f"{prefix}{i}.down_proj.weight", share, rank % share).T)
            put(prefix + "gate_up_proj.weight", np.stack(gate_up))
            put(prefix + "down_proj.weight", np.stack(down))

        vocabulary("model.embed_tokens.weight")
        vocabulary("lm_head.weight")
        put("model.norm.weight", self.value("model.norm.weight"))
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            attention, m = prefix + "self_attn.", prefix + "mlp."
            for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                put(prefix + norm, self.value(prefix + norm))
            put(attention + "o_proj.weight", cols(attention + "o_proj.weight"))
            if "kv_lora_rank" in c:
                self._latent(attention, put, rows)
            else:
                heads = c["num_key_value_heads"]
                ways, mine = min(tp, heads), rank * min(tp, heads) // tp
                k, v = (rows(f"{attention}{n}_proj.weight", ways, mine) for n in "kv")
                q = rows(attention + "q_proj.weight")
                put(attention + "qkv_proj.weight", np.concatenate([q, k, v]))
                for norm in ("q_norm.weight", "k_norm.weight"):
                    put(attention + norm, self.value(attention + norm))
            if m + "gate.weight" not in self.source:
                mlp(m)
                continue
            out[m + "gate.weight"] = self.source[m + "gate.weight"]  # in its own type
            bias = m + "gate.e_score_correction_bias"
            if bias in self.source:
                out[bias] = Stored("F32", widen(self.source[bias]).view(np.uint32))
            if m + "shared_experts.up_proj.weight" in self.source:
                mlp(m + "shared_experts.")
            experts(m + "experts.", len(self.source[m + "gate.weight"].bits))
        if tp > 1:
            out["vocab_start"] = Stored("I32", np.array([rank * math.ceil(c["vocab_size"] / tp)], np.uint32))
            onehot = np.eye(tp, dtype=np.float32)[rank].reshape(tp, 1, 1)
            out["rank_onehot"] = Stored("F32", onehot.view(np.uint32))
        if ep > 1:
            count = c["num_experts"] if "num_experts" in c else c["n_routed_experts"]
            out["expert_start"] = Stored("I32", np.array([rank * ep // tp * (count // ep)], np.uint32))
        return out

    def _latent(self, attention: str, put: Callable[[str, Bits], None], rows: Callable[..., Bits]) -> None:
        c = self.config
        nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]

        def halves(bits: Bits, head: int) -> Bits:
            """The rotated rows at the end of each head: x0 y0 x1 y1 ... becomes x0 x1 ... y0 y1 ..."""
            if not c.get("rope_interleave", True):
                return bits
            out = bits.copy().reshape(-1, head, bits.shape[1])
            tail = out[:, head - rope :].copy()
            for i in range(rope // 2):
                out[:, head - rope + i] = tail[:, 2 * i]
                out[:, head - rope + rope // 2 + i] = tail[:, 2 * i + 1]
            return out.reshape(bits.shape)

        if c["q_lora_rank"] is None:
            put(attention + "q_proj.weight", halves(rows(attention + "q_proj.weight"), nope + rope))
        else:
            for name in ("q_a_proj.weight", "q_a_layernorm.weight"):
                put(attention + name, self.value(attention + name))
            put(attention + "q_b_proj.weight", halves(rows(attention + "q_b_proj.weight"), nope + rope))
        latent = self.value(attention + "kv_a_proj_with_mqa.weight")
        put(attention + "kv_a_proj_with_mqa.weight", halves(latent, len(latent)))
        put(attention + "kv_a_layernorm.weight", self.value(attention + "kv_a_layernorm.weight"))
        heads = rows(attention + "kv_b_proj.weight").reshape(-1, nope + v, c["kv_lora_rank"])
        put(attention + "kv_b_proj_k.weight", heads[:, :nope].reshape(-1, c["kv_lora_rank"]))
        put(attention + "kv_b_proj_v.weight", heads[:, nope:].reshape(-1, c["kv_lora_rank"]))


def check(out: Path, model: Path, tp: int, ep: int, dtype: str, block: Block = BLOCK) -> None:
    """Every rank has what the reference says, and the manifest knows it."""
    reference = Reference(model, tp, ep, dtype, block)
    for rank in range(tp):
        found, wanted = read_rank(out, rank), reference.rank(rank)
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            assert (found[name].code, found[name].bits.shape) == (tensor.code, tensor.bits.shape), name
            assert np.array_equal(found[name].bits, tensor.bits), f"{name} of rank {rank}"
    manifest = read_manifest(out)
    assert (manifest.parallel.tp, manifest.parallel.ep) == (tp, ep)
    assert check_artifact(out, manifest) == []


# Right


@pytest.mark.parametrize(("tp", "ep"), MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_has_its_bits(artifact: Artifacts, model: Models, kind: str, tp: int, ep: int) -> None:
    dtype = KINDS[kind][1] or ("float32" if kind == "deepseek float32" else "bfloat16")
    check(artifact(kind, tp, ep), model(kind), tp, ep, dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"rope_interleave": False},
        {"q_lora_rank": None, "rope_interleave": False},
        {"n_shared_experts": 0},
        {"n_shared_experts": 3},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 2},
        {"qk_rope_head_dim": 2, "n_group": 1, "topk_group": 1},
    ],
)
def test_every_kind_of_deepseek(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = DEEPSEEK | changes
    plain = random_checkpoint(tmp_path / "plain", config)
    if config["n_shared_experts"] == 0:
        change(plain, lambda t: [t.pop(n) for n in list(t) if ".shared_experts." in n])
    fp8 = quantise_fp8(plain, tmp_path / "fp8", BLOCK)
    convert(fp8, tmp_path / "out", 4, ep=2)
    check(tmp_path / "out", fp8, 4, 2, "bfloat16")
    for old, new in (((4, 2), (8, 1)), ((8, 1), (2, 2))):
        source = tmp_path / ("out" if old == (4, 2) else "resharded-8-1")
        out = tmp_path / "resharded-{}-{}".format(*new)
        reshard(source, out, *new)
        check(out, fp8, *new, "bfloat16")


@pytest.mark.parametrize("changes", [{"mlp_only_layers": []}, {"decoder_sparse_step": 2, "mlp_only_layers": []}])
def test_every_kind_of_qwen(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = random_checkpoint(tmp_path / "model", QWEN | changes, "F16", mlp_gate_weight="BF16")
    convert(source, tmp_path / "out", 4, ep=4)
    check(tmp_path / "out", source, 4, 4, "float16")


@pytest.mark.parametrize("block", [(128, 128), (64, 128), (1, 128), (3, 7)])
def test_any_block(model: Models, tmp_path: Path, block: Block) -> None:
    source = quantise_fp8(model("deepseek FP8").with_name("plain"), tmp_path / "model", block, shards=2)
    convert(source, tmp_path / "out", 2, ep=2, dtype="float32")
    check(tmp_path / "out", source, 2, 2, "float32", block)


def test_blocks_of_the_published_size_in_matrices_that_do_not_divide(tmp_path: Path) -> None:
    config = DEEPSEEK | {
        "hidden_size": 320,
        "moe_intermediate_size": 192,
        "intermediate_size": 200,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "q_lora_rank": 129,
        "kv_lora_rank": 136,
    }
    source = quantise_fp8(random_checkpoint(tmp_path / "plain", config), tmp_path / "model")
    convert(source, tmp_path / "out", 4, ep=2)
    check(tmp_path / "out", source, 4, 2, "bfloat16", (128, 128))


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_router_and_bias_of_any_type(tmp_path: Path, code: str) -> None:
    """The router keeps its own, the bias becomes float32; and so they stay from layout to layout."""
    source = random_checkpoint(tmp_path / "model", DEEPSEEK, mlp_gate_weight=code, e_score_correction_bias=code)
    convert(source, tmp_path / "out", 2, ep=2, dtype="float16")
    check(tmp_path / "out", source, 2, 2, "float16")
    reshard(tmp_path / "out", tmp_path / "other", 4, 2)
    check(tmp_path / "other", source, 4, 2, "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("gate", "up"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16")])
def test_gate_and_up_of_two_types(tmp_path: Path, gate: str, up: str, dtype: str) -> None:
    """With --dtype any mixture may come; each tensor is cast from its own type."""
    source = random_checkpoint(tmp_path / "model", QWEN, gate_proj_weight=gate, up_proj_weight=up)
    convert(source, tmp_path / "out", 2, ep=2, dtype=dtype)
    check(tmp_path / "out", source, 2, 2, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("plain", ["gate", "up", "down", "q_b", "kv_b"])
def test_some_matrices_left_out_of_quantisation(model: Models, tmp_path: Path, plain: str, dtype: str) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    whole = read_checkpoint(model("deepseek FP8").with_name("plain"))

    def widened(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(f"{plain}_proj.weight") and ".layers.2." not in n]:
            tensors[name] = whole[name]
            del tensors[name + "_scale_inv"]

    change(source, widened)
    convert(source, tmp_path / "out", 2, ep=2, dtype=dtype)
    check(tmp_path / "out", source, 2, 2, dtype)


def test_the_manifest_says_what_was_dropped_and_cast(artifact: Artifacts, model: Models) -> None:
    manifest = read_manifest(artifact("deepseek FP8", 4, 2))
    weights, source = manifest.weights, read_checkpoint(model("deepseek FP8"))
    assert weights is not None
    assert (weights.source_dtype, weights.dtype) == ("float8_e4m3fn", "bfloat16")
    mtp = [n for n in source if n.startswith("model.layers.2.")]
    assert sum(d.count for d in weights.dropped) == len(mtp) > 100
    assert {d.reason for d in weights.dropped} == {"multi-token prediction layer, not part of the decoder"}
    counted = [n for n in source if n not in mtp and not n.endswith("_scale_inv")]
    assert manifest.model.parameters == sum(source[n].bits.size for n in counted)
    assert len(manifest.model.files) == 4


# The same bytes


@pytest.mark.parametrize("kind", RESHARDED)
@pytest.mark.parametrize("jobs", [1, 3])
def test_workers_and_small_blocks_write_the_same_bytes(
    artifact: Artifacts, model: Models, tmp_path: Path, kind: str, jobs: int
) -> None:
    for tp, ep in ((2, 1), (8, 4)):
        convert(model(kind), tmp_path / f"jobs-{tp}", tp, ep=ep, jobs=jobs)
        assert digests(tmp_path / f"jobs-{tp}") == digests(artifact(kind, tp, ep))
        conversion = prepare(model(kind), tp, ep, output=tmp_path / f"blocks-{tp}", jobs=jobs)
        run(replace(conversion, buffers=buffer_sizes(conversion.plan)))
        assert digests(tmp_path / f"blocks-{tp}") == digests(artifact(kind, tp, ep))


@pytest.mark.parametrize("kind", ["qwen3_moe as float16", "deepseek FP8 as float16", "deepseek FP8 as float32"])
def test_small_blocks_of_a_cast_write_the_same_bytes(
    artifact: Artifacts, model: Models, tmp_path: Path, kind: str
) -> None:
    conversion = prepare(model(kind), 4, 2, KINDS[kind][1], tmp_path / "out", jobs=2)
    run(replace(conversion, buffers=buffer_sizes(conversion.plan)))
    assert digests(tmp_path / "out") == digests(artifact(kind, 4, 2))


@pytest.mark.parametrize("seed", [1, 2])
def test_shards_do_not_matter(artifact: Artifacts, model: Models, tmp_path: Path, seed: int) -> None:
    """Scales and tensors dealt to shards in another way give the same weights."""
    plain = model("deepseek FP8").with_name("plain")
    source = add_mtp(quantise_fp8(plain, tmp_path / "model", BLOCK, shards=(1, 7)[seed - 1], seed=seed))
    convert(source, tmp_path / "out", 4, ep=2)
    assert weights_of(tmp_path / "out") == weights_of(artifact("deepseek FP8", 4, 2))


def weights_of(out: Path) -> Weights:
    weights = read_manifest(out).weights
    assert weights is not None
    return weights


# From one layout to another


def reshard(source: Path, out: Path, tp: int, ep: int, **options: Any) -> Converted:
    return run(prepare_reshard(source, tp, ep, output=out, **options))


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(MESHES, 2)))
@pytest.mark.parametrize("kind", RESHARDED)
def test_any_layout_becomes_any_other_to_the_byte(
    artifact: Artifacts, tmp_path: Path, kind: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    reshard(artifact(kind, *old), tmp_path / "out", *new)
    assert digests(tmp_path / "out") == digests(artifact(kind, *new))


@pytest.mark.parametrize("kind", ["qwen3_moe as float16", "deepseek FP8 as float32"])
def test_a_cast_is_made_once(artifact: Artifacts, tmp_path: Path, kind: str) -> None:
    for old, new in (((1, 1), (8, 4)), ((8, 4), (2, 1))):
        out = tmp_path / "{}-{}".format(*new)
        reshard(artifact(kind, *old), out, *new)
        assert digests(out) == digests(artifact(kind, *new))


@pytest.mark.parametrize("kind", RESHARDED)
def test_small_blocks_reshard_to_the_same_bytes(artifact: Artifacts, tmp_path: Path, kind: str) -> None:
    conversion = prepare_reshard(artifact(kind, 4, 4), 2, 1, tmp_path / "out", jobs=3)
    run(replace(conversion, buffers=buffer_sizes(conversion.plan)))
    assert digests(tmp_path / "out") == digests(artifact(kind, 2, 1))


def flip(artifact: Path, rank: int, entry: TensorEntry, offset: int) -> None:
    """Turn over one bit of a rank's tensor, and let the file look as before."""
    path = artifact / [f.path for f in weights_of(artifact).files if f.rank == rank][entry.file]
    data = bytearray(path.read_bytes())
    data[entry.begin + offset] ^= 1 << (offset % 8)
    path.write_bytes(data)


@pytest.mark.parametrize(("old", "new"), [((8, 4), (2, 1)), ((4, 2), (4, 4)), ((1, 1), (4, 2))])
@pytest.mark.parametrize("kind", RESHARDED)
def test_a_flipped_bit_of_any_tensor_of_a_layer_is_refused_by_name(
    own_artifact: Artifacts, tmp_path: Path, kind: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    """In any rank's file, its copies and constants included."""
    damaged = own_artifact(kind, *old)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    entries = [t for t in weights_of(damaged).tensors if ".layers.0." not in t.name and "vocab" not in t.name]
    entries = [t for t in entries if t.name not in ("model.embed_tokens.weight", "lm_head.weight")]
    for entry in rng.sample(entries, 3):
        rank, offset = rng.randrange(old[0]), rng.randrange(entry.nbytes)
        flip(damaged, rank, entry, offset)
        with pytest.raises(ArtifactError) as caught:
            reshard(damaged, tmp_path / "out", *new)
        assert entry.name in caught.value.message
        assert f"model-rank-{rank}-" in caught.value.message
        assert caught.value.hint
        assert_nothing(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        flip(damaged, rank, entry, offset)


@pytest.mark.parametrize("part", ["first expert", "last expert", "gate", "up"])
def test_a_flipped_bit_in_any_expert_is_refused(own_artifact: Artifacts, tmp_path: Path, part: str) -> None:
    damaged = own_artifact("deepseek FP8", 4, 2)
    entry = next(t for t in weights_of(damaged).tensors if t.name.endswith("experts.gate_up_proj.weight"))
    row = 2 * entry.shape[2]
    offset = {"first expert": 0, "last expert": entry.nbytes - 1, "gate": row // 2 - 1, "up": row // 2}[part]
    flip(damaged, 3, entry, offset)
    with pytest.raises(ArtifactError, match=re.escape(entry.name)):
        reshard(damaged, tmp_path / "out", 8, 1)
    assert_nothing(tmp_path / "out")


# Crashes


class Crash(Exception):
    """What the tests throw into a conversion."""


def crash(monkeypatch: pytest.MonkeyPatch, units: int, work: Callable[[], object]) -> None:
    """The work dies after some units, each durably done by then."""
    original = streaming.move_unit
    left = [units]

    def move(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise Crash
        left[0] -= 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "move_unit", move)
        patch.setattr(streaming, "CHECKPOINT_BYTES", 1)
        with pytest.raises(Crash):
            work()


@pytest.mark.parametrize("kind", RESHARDED)
@pytest.mark.parametrize("units", [1, 12, 30])
def test_a_crashed_conversion_resumes_to_the_same_bytes(
    artifact: Artifacts, model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, units: int
) -> None:
    whole = prepare(model(kind), 4, 2, output=tmp_path / "out").plan
    crash(monkeypatch, units, lambda: convert(model(kind), tmp_path / "out", 4, ep=2))
    assert_nothing(tmp_path / "out")
    done = convert(model(kind), tmp_path / "out", 4, ep=2, jobs=2)
    assert done.resumed
    assert 0 < done.bytes_read < whole.read_bytes
    assert digests(tmp_path / "out") == digests(artifact(kind, 4, 2))


@pytest.mark.parametrize("kind", RESHARDED)
def test_a_crashed_reshard_resumes_to_the_same_bytes(
    artifact: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / "out"
    crash(monkeypatch, 20, lambda: reshard(artifact(kind, 4, 4), out, 2, 1))
    assert_nothing(out)
    assert reshard(artifact(kind, 4, 4), out, 2, 1).resumed
    assert digests(out) == digests(artifact(kind, 2, 1))


def test_damage_that_a_crash_parted_from_the_rest_is_refused(
    own_artifact: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some experts of a stacked tensor were read before the crash, the damaged one among them."""
    damaged, out = own_artifact("qwen3_moe", 4, 2), tmp_path / "out"
    entry = next(t for t in weights_of(damaged).tensors if t.name.endswith("experts.gate_up_proj.weight"))
    flip(damaged, 0, entry, 3)
    units = 0
    order = prepare_reshard(damaged, 2, 1, out).plan
    names = sorted(order.units, key=lambda u: (order.sources[u[0]].file, order.sources[u[0]].offset))
    units = next(i for i, u in enumerate(names) if ".experts.2.gate_proj" in u[0])
    crash(monkeypatch, units, lambda: reshard(damaged, out, 2, 1))
    with pytest.raises(ArtifactError, match=re.escape(entry.name)):
        reshard(damaged, out, 2, 1)
    assert_nothing(out)


def faulty(fault: Fault, *arguments: object) -> Result:
    return run_command([sys.executable, str(FAULTS), fault.text(), *map(str, arguments)], None, 120)


def test_a_killed_conversion_resumes_to_the_same_bytes(artifact: Artifacts, model: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("convert", "--model", model("deepseek FP8"), "--tp", 4, "--ep", 2, "--output", out, "--json")
    killed = faulty(Fault("kill", 20, ("write",), "journal"), *options, "--jobs", 2)
    assert killed.code == -signal.SIGKILL, killed.stderr
    assert_nothing(out)
    done = run_msconv(*options, "--jobs", 1)
    assert done.code == 0, done.stderr
    assert done.json["resumed"] is True
    assert digests(out) == digests(artifact("deepseek FP8", 4, 2))


# Wrong


def own(directory: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(directory, tmp_path / "own" / "model"))


def change(directory: Path, edit: Callable[[Tensors], object]) -> Path:
    """Edit a checkpoint's tensors; it is one file afterwards."""
    tensors = read_checkpoint(directory)
    edit(tensors)
    for path in (*directory.glob("*.safetensors"), *directory.glob("*.index.json")):
        path.unlink()
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def assert_nothing(out: Path) -> None:
    """Nothing here looks finished."""
    assert not (out / "READY").exists()
    assert not list(out.glob("weights/*.safetensors"))


def refused(source: Path, out: Path, kind: type[MsconvError], tp: int = 2, ep: int = 2, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(source, out, tp, ep=ep, **options)
    assert caught.value.hint
    assert_nothing(out)
    assert out.exists() == (kind is CheckpointError)  # a plan that cannot be leaves no directory
    return caught.value.message


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
NORM = "model.layers.1.input_layernorm.weight"
SCALED = "_scale_inv"
NO_TYPE = "element type float8_e4m3fn is not a weight type"


def as_fp8(name: str, scaled: bool = True) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        shape = tensors[name].bits.shape
        tensors[name] = Stored("F8_E4M3", np.full(shape, 0x38, np.uint8))
        if scaled:
            tensors[name + SCALED] = Stored("F32", np.ones([math.ceil(n / 16) for n in shape], np.uint32))

    return edit


def scale_as(code: str, shape: Callable[[Bits], Bits] = lambda bits: bits) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        bits = shape(tensors[EXPERT + SCALED].bits)
        tensors[EXPERT + SCALED] = Stored(code, np.ascontiguousarray(bits).astype(BITS.get(code, np.uint8)))

    return edit


def added(name: str, code: str = "F32", shape: tuple[int, ...] = (1, 1)) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: Stored(code, np.zeros(shape, BITS[code]))})


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


PLANNED: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "no scale": (without(EXPERT + SCALED), ("Missing from the checkpoint (1)", EXPERT + SCALED)),
    "no scale of attention": (without(KV_B + SCALED), ("Missing from the checkpoint (1)", KV_B + SCALED)),
    "scale turned over": (
        lambda t: t.update({KV_B + SCALED: Stored("F32", np.ascontiguousarray(t[KV_B + SCALED].bits.T))}),
        (KV_B + SCALED, "has shape [1, 20]", "blocks of 16x40 need [20, 1]"),
    ),
    "scale of one block more": (
        scale_as("F32", lambda b: np.concatenate([b, b])),
        (EXPERT + SCALED, "has shape [4, 2]", "need [2, 2]"),
    ),
    "flat scale": (scale_as("F32", np.ravel), (EXPERT + SCALED, "has shape [4]", "need [2, 2]")),
    "scale of whole numbers": (scale_as("I32"), (EXPERT + SCALED, "element type int32")),
    "scale of an FP8 router": (as_fp8(ROUTER), (ROUTER, NO_TYPE)),
    "FP8 router": (as_fp8(ROUTER, scaled=False), (ROUTER, NO_TYPE)),
    "FP8 norm": (as_fp8(NORM, scaled=False), (NORM, NO_TYPE)),
    "FP8 norm and scale": (as_fp8(NORM), (NORM, NO_TYPE)),
    "FP8 bias": (
        as_fp8("model.layers.1.mlp.gate.e_score_correction_bias", scaled=False),
        ("e_score_correction_bias", NO_TYPE),
    ),
    "scale of a tensor that is not FP8": (added(NORM + SCALED), ("unknown to this model (1)", NORM + SCALED)),
    "scale of a matrix that is not FP8": (added(ROUTER + SCALED), ("unknown to this model (1)", ROUTER + SCALED)),
    "scale of nothing": (
        added("model.layers.1.mlp.experts.16.up_proj.weight_scale_inv"),
        ("unknown to this model (1)", "experts.16.up_proj.weight_scale_inv"),
    ),
    "a matrix of an expert is missing": (
        without(EXPERT, EXPERT + SCALED),
        ("Missing from the checkpoint (1)", EXPERT),
    ),
    "an expert is missing": (
        lambda t: [t.pop(n) for n in list(t) if ".experts.5." in n and ".layers.1." in n],
        ("Missing from the checkpoint (3)", "model.layers.1.mlp.experts.5.gate_proj.weight"),
    ),
    "an unknown expert": (
        added("model.layers.1.mlp.experts.16.up_proj.weight", "BF16", (32, 56)),
        ("unknown to this model (1)", "model.layers.1.mlp.experts.16.up_proj.weight"),
    ),
    "an expert in a dense layer": (
        added("model.layers.0.mlp.experts.0.up_proj.weight", "BF16", (32, 56)),
        ("unknown to this model (1)", "model.layers.0.mlp.experts.0.up_proj.weight"),
    ),
    "an MTP layer more than announced": (
        added("model.layers.3.enorm.weight", "BF16", (56,)),
        ("unknown to this model (1)", "model.layers.3.enorm.weight"),
    ),
    "another FP8": (
        lambda t: t.update({EXPERT: Stored("F8_E5M2", t[EXPERT].bits)}),
        (EXPERT, "float8_e5m2"),
    ),
}


@pytest.mark.parametrize("case", PLANNED)
def test_headers_that_do_not_fit_together_are_refused_by_name(model: Models, tmp_path: Path, case: str) -> None:
    edit, words = PLANNED[case]
    source = change(own(model("deepseek FP8"), tmp_path), edit)
    message = refused(source, tmp_path / "out", PlanError)
    assert all(word in message for word in words), message


def test_fp8_without_a_word_about_its_blocks_is_refused(model: Models, tmp_path: Path) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    edit_json(source / "config.json", quantization_config=None)
    message = refused(source, tmp_path / "out", PlanError)
    assert "no quantization_config" in message
    assert "model.layers.1.mlp.experts.{0..15}.up_proj.weight" in message
    assert "unknown to this model" not in message  # the scales are not news
    assert len(message.splitlines()) < 30


def test_blocks_of_another_size_than_the_scales_are_refused(model: Models, tmp_path: Path) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    quantisation = config_of(source)["quantization_config"] | {"weight_block_size": [40, 16]}
    edit_json(source / "config.json", quantization_config=quantisation)
    message = refused(source, tmp_path / "out", PlanError)
    assert "blocks of 40x16 need" in message


def test_quantisation_that_is_announced_and_not_there_is_nothing(tmp_path: Path) -> None:
    """A checkpoint that was dequantised before, with its config.json left as it was."""
    source = random_checkpoint(tmp_path / "model", DEEPSEEK)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_json(source / "config.json", quantization_config=quantisation)
    convert(source, tmp_path / "out", 2, ep=2)
    check(tmp_path / "out", source, 2, 2, "bfloat16")


def spoil(name: str, *, at: tuple[int, int], value: float) -> Callable[[Tensors], None]:
    """Another scale for a block."""

    def edit(tensors: Tensors) -> None:
        scales = tensors[name + SCALED].bits.copy().view(np.float32)
        scales[at] = value
        tensors[name + SCALED] = Stored("F32", scales.view(np.uint32))

    return edit


def put_codes(name: str, *places: tuple[int, int, int]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        codes = tensors[name].bits.copy()
        for row, column, code in places:
            codes[row, column] = code
        tensors[name] = Stored("F8_E4M3", codes)

    return edit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [EXPERT, KV_B, "model.layers.1.self_attn.o_proj.weight"])
def test_a_scale_that_is_no_number_is_refused_with_its_block(
    model: Models, tmp_path: Path, name: str, value: float
) -> None:
    source = change(own(model("deepseek FP8"), tmp_path), spoil(name, at=(1, 0), value=value))
    message = refused(source, tmp_path / "out", CheckpointError)
    assert name + SCALED in message
    assert "[1, 0]" in message
    assert str(value) in message


@pytest.mark.parametrize("name", [EXPERT, KV_B, "model.layers.0.mlp.down_proj.weight"])
def test_codes_that_are_no_numbers_are_refused_and_counted(model: Models, tmp_path: Path, name: str) -> None:
    edit = put_codes(name, (17, 3, 0x7F), (2, 30, 0xFF))
    source = change(own(model("deepseek FP8"), tmp_path), edit)
    message = refused(source, tmp_path / "out", CheckpointError)
    assert name in message
    assert "2 of its FP8 codes are no number" in message


def test_codes_that_are_no_numbers_do_no_harm_in_what_is_dropped(
    artifact: Artifacts, model: Models, tmp_path: Path
) -> None:
    edit = put_codes(EXPERT.replace("layers.1", "layers.2"), (17, 3, 0x7F))
    source = change(own(model("deepseek FP8"), tmp_path), edit)
    convert(source, tmp_path / "out", 2, ep=2)
    assert read_rank(tmp_path / "out", 1).keys() == read_rank(artifact("deepseek FP8", 2, 2), 1).keys()


@pytest.mark.parametrize("scale", [200.0, -1e5, 1e38])
@pytest.mark.parametrize("name", [EXPERT, KV_B])
def test_fp8_values_beyond_float16_are_refused_and_fit_bfloat16(
    model: Models, tmp_path: Path, name: str, scale: float
) -> None:
    """Also such that float32 cannot hold: they are not let through as infinite."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = Stored("F8_E4M3", np.zeros_like(tensors[name].bits))
        put_codes(name, (17, 3, 0x7E), (18, 4, 0xFE), (2, 7, 0x7E))(tensors)  # 448, -448, 448
        spoil(name, at=(0, 0), value=1.0)(tensors)
        spoil(name, at=(1, 0), value=scale)(tensors)

    source = change(own(model("deepseek FP8"), tmp_path), edit)
    message = refused(source, tmp_path / "out", CheckpointError, dtype="float16")
    assert name in message
    assert "65504" in message
    assert "2 values" in message
    if scale == 200:
        convert(source, tmp_path / "wide", 2, ep=2, dtype="bfloat16")
        check(tmp_path / "wide", source, 2, 2, "bfloat16")


def test_a_large_scale_of_small_codes_fits_float16(model: Models, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in (EXPERT, KV_B):
            tensors[name] = Stored("F8_E4M3", tensors[name].bits & 0x0F)  # at most 2 ** -6 * 1.875
            spoil(name, at=(0, 0), value=1000.0)(tensors)

    source = change(own(model("deepseek FP8"), tmp_path), edit)
    convert(source, tmp_path / "out", 2, ep=2, dtype="float16")
    check(tmp_path / "out", source, 2, 2, "float16")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.5.up_proj.weight", "lm_head.weight"])
def test_plain_values_beyond_float16_are_refused(tmp_path: Path, name: str) -> None:
    source = random_checkpoint(tmp_path / "model", DEEPSEEK)

    def edit(tensors: Tensors) -> None:
        values = widen(tensors[name]).copy()
        values[3, 4] = 1e5
        tensors[name] = Stored("BF16", narrow(values, "BF16"))

    message = refused(change(source, edit), tmp_path / "out", CheckpointError, dtype="float16")
    assert f"{name}: 1 values are beyond float16's range" in message


@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-149, -1.0])
def test_scales_that_are_odd_but_numbers_are_obeyed(model: Models, tmp_path: Path, scale: float) -> None:
    def edit(tensors: Tensors) -> None:
        for name in (EXPERT, KV_B):
            spoil(name, at=(1, 0), value=scale)(tensors)

    source = change(own(model("deepseek FP8"), tmp_path), edit)
    convert(source, tmp_path / "out", 2, ep=2)
    check(tmp_path / "out", source, 2, 2, "bfloat16")


@pytest.mark.parametrize("indexed", ["first", "second"])
def test_an_expert_in_two_shards_is_refused(model: Models, tmp_path: Path, indexed: str) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first = index["weight_map"][EXPERT]
    second = next(f for f in sorted(set(index["weight_map"].values())) if f != first)
    tensors = read_safetensors(source / second)
    write_safetensors(source / second, tensors | {EXPERT: Stored("F8_E4M3", np.zeros((32, 56), np.uint8))})
    index["weight_map"][EXPERT] = first if indexed == "first" else second
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", 2, ep=2)
    assert EXPERT in caught.value.message
    assert first in caught.value.message
    assert second in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [
        (16, 16, ("8 heads do not split over tp=16", "12 experts do not split over ep=16")),
        (8, 1, ("36 rows do not split over the 8 ranks of an expert", "36 columns")),
        (8, 8, ("12 experts do not split over ep=8",)),
    ],
)
def test_layouts_that_do_not_divide_are_refused(tmp_path: Path, tp: int, ep: int, words: tuple[str, ...]) -> None:
    config = DEEPSEEK | {"n_routed_experts": 12, "moe_intermediate_size": 36, "n_shared_experts": 2}
    source = write_sparse(tmp_path / "model", config, deepseek_v3(config))
    message = refused(source, tmp_path / "out", PlanError, tp, ep)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_the_command_line_exits_2_if_ep_does_not_divide_tp(model: Models, tmp_path: Path, command: str) -> None:
    options = ("--model", model("qwen3_moe"), "--tp", 2, "--ep", 4, "--output", tmp_path / "out", "--json")
    done = run_msconv(command, *options)
    assert done.code == 2, done.stdout
    assert done.json["error"]["code"] == "usage"
    assert "ep 4" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_expert_parallelism_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    source = write_synthetic(tmp_path / "dense", qwen3_config())
    assert "this model has no experts" in refused(source, tmp_path / "out", PlanError)


# Memory


def wide_config(**changes: Any) -> dict[str, Any]:
    """Layers wide enough for tables of values to count, 50 MB of FP8."""
    wide = {"hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 1024, "vocab_size": 512}
    wide |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "n_shared_experts": 1}
    return DEEPSEEK | wide | changes


def peak_and_plan(source: Path, out: Path) -> tuple[int, int]:
    """What a conversion needed at most, and what was planned."""
    planned = prepare(source, 4, 2, output=out, jobs=2).planned_memory_bytes
    options = ("--model", source, "--tp", 4, "--ep", 2, "--jobs", 2, "--json", "--output", out)
    done = run_msconv("convert", *options)
    assert done.code == 0, done.stderr
    return done.json["peak_rss_bytes"], planned


@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
def test_fp8_keeps_the_planned_memory(tmp_path: Path, block: Block) -> None:
    """Tables of a block's values and the code that looks them up count too."""
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    config = wide_config(quantization_config=quantisation)
    peak, planned = peak_and_plan(
        write_sparse(tmp_path / "model", config, deepseek_v3(config), 2), tmp_path / "out"
    )
    assert peak <= planned


def test_turning_over_keeps_the_planned_memory(tmp_path: Path) -> None:
    """So does the code that turns matrices over, FP8 or not."""
    config = wide_config(n_routed_experts=2, n_group=1, topk_group=1)
    peak, planned = peak_and_plan(
        write_sparse(tmp_path / "model", config, deepseek_v3(config), 2), tmp_path / "out"
    )
    assert peak <= planned

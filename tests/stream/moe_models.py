"""Small checkpoints of models with experts in every type, and what must become of them, from the source alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from msconv.steps.conversion import Converted, run
from msconv.steps.reshard import prepare as prepare_reshard
from msconv_runtime.artifact import Artifact, Weights, read_manifest
from msconv_runtime.artifact.integrity import check_artifact
from tests.checkpoints import (
    BITS,
    Bits,
    Stored,
    read_checkpoint,
    read_rank,
    write_safetensors,
)
from tests.conversions import config_of
from tests.moe_checkpoints import (
    SMALL_DEEPSEEK_V3,
    SMALL_QWEN3_MOE,
    Block,
    add_mtp,
    dequantise,
    quantise_fp8,
    widen,
)
from tests.published import deepseek_v3, qwen3_moe, shard_name, write_index

MESHES = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
DRAFTS_OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
BLOCK = (16, 40)  # divides few of the sizes
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


def weights_of(out: Path) -> Weights:
    weights = read_manifest(out).weights
    assert weights is not None
    return weights


def reshard(source: Path, out: Path, tp: int, ep: int, **options: Any) -> Converted:
    return run(prepare_reshard(source, tp, ep, output=out, **options))


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
        drafts = c.get("num_nextn_predict_layers", 0)
        for layer in range(c["num_hidden_layers"] + drafts):
            prefix = f"model.layers.{layer}."
            attention, m = prefix + "self_attn.", prefix + "mlp."
            for own in DRAFTS_OWN if layer >= c["num_hidden_layers"] else ():
                put(prefix + own, self.value(prefix + own))
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
    assert check_artifact(Artifact(out)) == []

"""Proofs of models with experts: both families, on each target, whatever the ranks and the groups of experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from msconv.steps.compile import compile_graphs
from msconv.verify import subject as proving
from msconv.verify.compare import compare
from msconv.verify.prove import prove
from msconv.verify.reference import Reference
from msconv.verify.result import Proof
from msconv.verify.scenario import EVERY
from msconv_runtime import Session
from msconv_runtime.artifact import read_manifest, write_manifest
from tests.checkpoints import Bits, read_safetensors, write_safetensors
from tests.conversions import convert
from tests.every import one_of_many
from tests.moe_checkpoints import add_mtp, make_deepseek_v3, make_qwen3_moe, quantise_fp8

pytestmark = pytest.mark.slow

BOTH = ("cpu", "ascend910b")
ROWS = 72 + 2 * sum(EVERY)  # of logits, from MindSpore's operations and from compiled kernels
PLAIN_ROPE = {"rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}  # 3: what no length implies
QWEN: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 203,  # odd: the last rank is padded
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
    "max_position_embeddings": 128,
}
DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 128,
}
WIDE = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 192}  # blocks of 128 end within


@dataclass(frozen=True)
class Case:
    """A model, how it is cut, and the targets it is proven for.  `fp8`: quantised, with a layer for prediction."""

    family: str
    tp: int
    ep: int
    values: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = BOTH
    fp8: bool = False
    dtype: str | None = None

    def make(self, directory: Path) -> Path:
        if self.family == "qwen3_moe":
            return make_qwen3_moe(directory / "model", **{**QWEN, **self.values})
        model = make_deepseek_v3(directory / "model", **{**DEEPSEEK, **self.values})
        return quantise_fp8(add_mtp(model), directory / "fp8", shards=2) if self.fp8 else model


# Each number of ranks and groups on cpu and 910B for each family, each variant at least once.
CASES = {
    "qwen, first layer dense": Case("qwen3_moe", 1, 1, {"mlp_only_layers": [0]}),
    "qwen, every second layer, tiles of attention": Case(
        "qwen3_moe", 2, 1, {"decoder_sparse_step": 2, "max_position_embeddings": 512}
    ),
    "qwen, one expert a token, weights as they are": Case(
        "qwen3_moe", 2, 2, {"num_hidden_layers": 1, "norm_topk_prob": False, "num_experts_per_tok": 1}
    ),
    "qwen, bfloat16": Case(
        "qwen3_moe",
        4,
        2,
        {"dtype": "bfloat16", "shards": 2, "num_hidden_layers": 1},
        ("cpu", "ascend910b", "ascend910c"),
    ),
    "qwen, all experts": Case("qwen3_moe", 4, 4, {"num_hidden_layers": 1, "num_experts_per_tok": 16}),
    "qwen, more ranks than key heads": Case("qwen3_moe", 8, 4, {"norm_topk_prob": False}),
    "qwen, float16": Case("qwen3_moe", 4, 2, {"dtype": "float16", "mlp_only_layers": [0]}, ("ascend310p",)),
    "deepseek, two shared experts, narrow values": Case(
        "deepseek_v3", 1, 1, {"n_shared_experts": 2, "v_head_dim": 16}
    ),
    "deepseek, no q_lora, wide values, one group": Case(
        "deepseek_v3",
        2,
        1,
        {
            "q_lora_rank": None,
            "v_head_dim": 40,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": YARN,
            "max_position_embeddings": 512,
        },
    ),
    "deepseek, halves, weights as they are": Case(
        "deepseek_v3",
        2,
        2,
        {
            "num_hidden_layers": 1,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "rms_norm_eps": 1e-3,  # not of the norms inside latent attention
        },
    ),
    "deepseek, fp8 to bfloat16": Case(
        "deepseek_v3", 4, 2, WIDE, ("cpu", "ascend910b", "ascend910c"), fp8=True, dtype="bfloat16"
    ),
    "deepseek, one of two groups, one expert": Case(
        "deepseek_v3",
        4,
        4,
        {
            "num_hidden_layers": 1,
            "first_k_dense_replace": 0,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 1,
            "rope_parameters": PLAIN_ROPE,
        },
    ),
    "deepseek, fp8 to float32": Case("deepseek_v3", 8, 4, WIDE, fp8=True, dtype="float32"),
    "deepseek, fp8 to float16": Case(
        "deepseek_v3", 4, 2, {**WIDE, "v_head_dim": 32}, ("ascend310p",), fp8=True, dtype="float16"
    ),
}


SLOW = (  # each part of them is in another case too, in test_other_names.py or in test_ascend.py
    "qwen, first layer dense",
    "qwen, all experts",
    "qwen, more ranks than key heads",
    "deepseek, no q_lora, wide values, one group",
    "deepseek, fp8 to float32",
)
PROVED = [pytest.param(name, marks=one_of_many("test-names") if name in SLOW else ()) for name in CASES]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps of decode, and one thread: tiny matrices only wait for more."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setattr(proving, "compare", lambda *a, **k: compare(*a, **{**k, "steps": 2}))


def proven(root: Path, target: str, reference: Path | None = None) -> Proof:
    proof = prove(root, target, reference)
    c = proof.comparison
    assert c.max_abs_logit_error < 1e-4, c
    assert c.argmax_agreement == 1.0
    assert c.rows >= 24
    assert c.undecided <= 6, c
    assert c.closest_routing > 2e-5
    assert proof.missing == proof.unused == []
    assert proof.ok, c
    assert read_manifest(root).proof_for(target) is not None
    return proof


def test_the_cases_cover_all_layouts_on_both_targets() -> None:
    meshes = {(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)}
    for family in ("qwen3_moe", "deepseek_v3"):
        for target in BOTH:
            found = {(c.tp, c.ep) for c in CASES.values() if c.family == family and target in c.targets}
            assert found == meshes
        for target in ("ascend910c", "ascend310p"):
            assert any(c.ep > 1 for c in CASES.values() if c.family == family and target in c.targets)


@pytest.mark.parametrize("name", PROVED)
def test_experts_are_proven(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    root = tmp_path / "artifact"
    convert(case.make(tmp_path), root, case.tp, ep=case.ep, **({"dtype": case.dtype} if case.dtype else {}))
    for target in case.targets:
        compile_graphs(root, target)
        proof = proven(root, target)
        assert proof.ranks == case.tp
        assert (proof.comparison.closest_routing == float("inf")) == (case.values.get("num_experts_per_tok") == 16)
    if "ascend910c" in case.targets:
        for phase in ("prefill", "decode", "verify"):
            files = [root / "graphs" / t / f"{phase}.mindir" for t in ("ascend910b", "ascend910c")]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_without_a_shared_expert_there_is_none(tmp_path: Path) -> None:
    """As DeepSeek's code has it: where n_shared_experts is null or 0, no tensor of one is stored."""
    values = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_shared_experts": 0}
    model = make_deepseek_v3(tmp_path / "model", **{**DEEPSEEK, **values})
    for path in model.glob("*.safetensors"):
        write_safetensors(path, {n: t for n, t in read_safetensors(path).items() if t.bits.size})
    root = tmp_path / "artifact"
    convert(model, root, 2, ep=2)
    compile_graphs(root, "ascend910b")
    proven(root, "ascend910b")


DEFAULTS = ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor")


@pytest.mark.parametrize("key", [*DEFAULTS, "norm_topk_prob", "rope_interleave"])
def test_what_a_configuration_does_not_say_is_what_transformers_takes(tmp_path: Path, key: str) -> None:
    """A configuration without the key is either refused or read as transformers reads it."""
    import json

    from transformers import AutoConfig

    from msconv.families import configure
    from msconv_runtime.errors import CheckpointError

    sizes = {"num_hidden_layers": 5, "moe_intermediate_size": 8, "n_routed_experts": 64}
    values = {**DEEPSEEK, **sizes, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
    model = make_deepseek_v3(tmp_path / "model", **values)
    raw = json.loads((model / "config.json").read_text())
    raw.pop(key, None)
    (model / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(model)
    try:
        ours = configure(raw, "config.json")[1]
    except CheckpointError:
        return
    assert ours.moe is not None
    assert ours.mla is not None
    found = {
        "n_group": ours.moe.groups,
        "topk_group": ours.moe.top_groups,
        "n_shared_experts": ours.moe.shared_ffn // ours.moe.ffn,
        "first_k_dense_replace": ours.moe.layers.index(True),
        "routed_scaling_factor": ours.moe.scale,
        "norm_topk_prob": ours.moe.normalise,
        "rope_interleave": ours.mla.interleaved,
    }
    assert found[key] == getattr(theirs, key)


@pytest.mark.parametrize("changes", [{"kv_lora_rank": 1024}, {"kv_lora_rank": 30}, {"v_head_dim": 1032}], ids=str)
def test_attention_over_latents_is_refused_where_the_primitive_does_not_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    """PagedAttention's rows are whole latents, FlashAttentionScore's as wide as the widest of a head's parts."""
    from msconv.location import LocalDirectory
    from msconv.steps.compile import begin_without_weights
    from msconv_runtime.errors import UsageError

    class Exported(Exception):
        pass

    def export(*_: Any) -> None:
        raise Exported

    monkeypatch.setattr("msconv.graph.export.export", export)
    for number, (values, refusal) in enumerate((({}, Exported), (changes, UsageError))):
        model, root = tmp_path / f"model-{number}", tmp_path / f"graphs-{number}"
        make_deepseek_v3(model, **{**DEEPSEEK, **values})
        for path in model.glob("*.safetensors"):
            path.unlink()
        begin_without_weights(LocalDirectory(model), 1, 1, root)
        with pytest.raises(refusal):
            compile_graphs(root, "ascend910b")


# A small model whose router can be told where to send tokens: its bias decides.  3 experts a token: no size that
# arises is a multiple of another.
LAB: dict[str, Any] = {
    **DEEPSEEK,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
}
BIAS, ROUTER = "model.layers.0.mlp.gate.e_score_correction_bias", "model.layers.0.mlp.gate.weight"
Edit = Callable[[dict[str, Bits]], None]


@dataclass(frozen=True)
class Lab:
    """Artifacts of one model with other routers; the graphs are compiled once."""

    model: Path
    sound: dict[int, Path]  # number of ranks, each with experts of its own -> artifact

    def build(self, directory: Path, ranks: int, edit: Edit) -> tuple[Path, Path]:
        """The edited checkpoint, and its artifact with the sound one's graphs."""
        model, root = Path(shutil.copytree(self.model, directory / "model")), directory / "artifact"
        (path,) = model.glob("*.safetensors")
        tensors = read_safetensors(path)
        values = {name: t.bits.copy() for name, t in tensors.items()}
        edit(values)
        write_safetensors(path, {n: with_bits(t, values[n]) for n, t in tensors.items()})
        convert(model, root, ranks, ep=ranks)
        shutil.copytree(self.sound[ranks] / "graphs", root / "graphs")
        graphs = read_manifest(self.sound[ranks]).graphs
        write_manifest(root, msgspec.structs.replace(read_manifest(root), graphs=graphs))
        return model, root


def with_bits(tensor: Any, bits: Bits) -> Any:
    return type(tensor)(tensor.code, bits)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    directory = tmp_path_factory.mktemp("lab")
    model = make_deepseek_v3(directory / "model", **LAB)
    sound = {}
    for ranks in (1, 2):
        sound[ranks] = directory / f"ranks-{ranks}"
        convert(model, sound[ranks], ranks, ep=ranks)
        compile_graphs(sound[ranks], "cpu")
    return Lab(model, sound)


def prefer(*experts: int) -> Edit:
    """A bias that sends every token to these."""

    def edit(values: dict[str, Bits]) -> None:
        bias = np.zeros(16, np.float32)
        bias[list(experts)] = 10
        values[BIAS] = bias.view(np.uint32)

    return edit


def twins(values: dict[str, Bits]) -> None:
    """Experts 2 and 3 have the same score, whatever the token."""
    for name in (BIAS, ROUTER):
        values[name][3] = values[name][2]


def always_tied(values: dict[str, Bits]) -> None:
    """Two experts that all tokens want, and twins for the third place."""
    prefer(0, 1, 2, 3)(values)
    values[BIAS][:2] = np.float32(20).view(np.uint32)
    twins(values)


def rarely_tied(values: dict[str, Bits]) -> None:
    """Twins that some tokens want: not all sequences that are drawn are free of ties."""
    values[BIAS].view(np.float32)[2] = 0.0
    twins(values)


FAVOURITES = {
    "all to the first three": (0, 1, 2),
    "all to the last three": (13, 14, 15),
    "all to three far apart": (15, 0, 7),
    "all to the second rank": (8, 11, 15),
    "all to the first rank": (0, 5, 7),
    "one on the second rank": (1, 2, 8),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FAVOURITES)
def test_every_token_wants_the_same_experts(lab: Lab, tmp_path: Path, name: str, ranks: int) -> None:
    """Places for tokens are counted in the graph: they suffice, wherever all go, and a rank that has none too."""
    _, root = lab.build(tmp_path, ranks, prefer(*FAVOURITES[name]))
    proven(root, "cpu")


PROMPTS: dict[str, list[list[int]]] = {
    "one token": [[5]],
    "two sequences of one": [[5], [200]],
    "seven tokens": [[1, 2, 3, 4, 5, 6, 7]],
    "the same token": [[9] * 31],
    "ragged": [[1], [2] * 64, [3, 4]],
}


@pytest.mark.parametrize("favourites", [(), (4, 5, 6)], ids=["as they fall", "all to three"])
def test_a_prompt_of_any_size_is_computed_by_mindspore(
    lab: Lab, tmp_path: Path, favourites: tuple[int, ...]
) -> None:
    model, root = lab.build(tmp_path, 1, prefer(*favourites) if favourites else lambda values: None)
    session, reference = Session(root, "cpu"), Reference(model, read_manifest(root))
    for name, prompts in PROMPTS.items():
        found = session.prefill(prompts)
        for row, trace in zip(found, reference.traces(prompts), strict=True):
            assert trace.closest.min() > 2e-5, name
            assert np.abs(row - trace.logits[-1]).max() < 1e-4, name


# Ties: which of two equal experts is taken, nobody promises.
def test_a_router_that_is_always_tied_is_not_proven(lab: Lab, tmp_path: Path) -> None:
    _, root = lab.build(tmp_path, 1, always_tied)
    proof = prove(root, "cpu", None)
    c = proof.comparison
    assert (c.rows, c.undecided) == (0, ROWS)
    assert not proof.ok
    assert read_manifest(root).proof_for("cpu") is None


def test_the_message_about_a_tied_router_says_so(lab: Lab, tmp_path: Path) -> None:
    """Nothing differs: to look for a wrong reference, as a failed proof otherwise asks for, leads nowhere."""
    from click.testing import CliRunner

    from msconv.cli.verify import command

    _, root = lab.build(tmp_path, 1, always_tied)
    done = CliRunner().invoke(command, [str(root)])
    message = getattr(done.exception, "message", "") or done.output
    assert done.exit_code != 0
    assert "rout" in message or "undecided" in message or "left out" in message


def test_a_router_that_is_rarely_tied_is_proven_by_the_other_rows(lab: Lab, tmp_path: Path) -> None:
    _, root = lab.build(tmp_path, 1, rarely_tied)
    c = prove(root, "cpu", None).comparison
    assert 0 < c.undecided <= c.rows
    assert c.ok
    assert c.rows + c.undecided == ROWS
    assert c.closest_routing > 2e-5
    assert read_manifest(root).proof_for("cpu") is not None


@pytest.mark.parametrize("tie", [rarely_tied, always_tied], ids=lambda tie: tie.__name__)
@pytest.mark.parametrize("fault", ["experts exchanged", "router forgotten"])
def test_ties_do_not_let_a_wrong_model_pass(lab: Lab, tmp_path: Path, tie: Edit, fault: str) -> None:
    """The artifact is of a faulty copy, the reference of the checkpoint with the tie."""

    def faulty(values: dict[str, Bits]) -> None:
        tie(values)
        for part in ("gate_proj", "up_proj", "down_proj") if fault == "experts exchanged" else ():
            a, b = (f"model.layers.0.mlp.experts.{e}.{part}.weight" for e in (0, 9))
            values[a], values[b] = values[b], values[a]
        if fault == "router forgotten":
            values[ROUTER][4:] = np.roll(values[ROUTER][4:], 1, axis=0)

    (tmp_path / "right").mkdir()
    right, _ = lab.build(tmp_path / "right", 1, tie)
    _, root = lab.build(tmp_path, 1, faulty)
    assert not prove(root, "cpu", right).ok

"""Compiling: time, memory, nodes and size at real shapes; and loading a MindIR against tracing the same model.

    python benchmarks/compile.py --models Qwen3-8B:4,Qwen3-32B:8 --layers 36,61 --json FILE

Models are compiled from their configuration alone.  Loading and tracing run on the CPU in processes of their
own, alternated, at small width: what is measured is the front end, which does not depend on the width.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.synthetic import CONFIGS

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

LOAD = """
import json, sys, time
from pathlib import Path
import mindspore
from msconv_runtime.artifact import Artifact, read_manifest
from msconv_runtime.graphs import Graphs
root = Path(sys.argv[1])
started = time.perf_counter()
graphs = Graphs(Artifact(root), "cpu", compiled=False)  # those that are traced
graphs.warm_up()
print(json.dumps(time.perf_counter() - started))
"""

TRACE = """
import json, sys, time
from pathlib import Path
import numpy as np
import mindspore as ms
from mindspore import Tensor
from msconv.families import configure
from msconv.graph.export import build, placeholders
from msconv.graph.parameters import restore_names
from msconv.graph.spec import Local
from msconv.layout.cuts import Mesh
from msconv_runtime.roles import DECODE, PREFILL, VERIFY
from msconv_runtime.targets import CPU
raw = json.loads(Path(sys.argv[1], "config.json").read_text())
config = configure(raw, "config.json")[1]
ms.set_context(mode=ms.GRAPH_MODE)
one, zero = Tensor([1], ms.int32), Tensor([0], ms.int32)
started = time.perf_counter()
for role in (PREFILL, DECODE, VERIFY):
    local = Local(config, Mesh(1), CPU, role)
    ops, net, inputs = build(local)
    restore_names(net)
    net.set_inputs(*placeholders(inputs))
    shape = (32, ops.page, local.kv_heads, config.head_dim)
    caches = [Tensor(np.zeros(shape, np.float32)) for i in inputs if i.kind == "cache"]
    net(zero, zero, Tensor([16], ms.int32), Tensor([[16]], ms.int32), one, one, *caches).asnumpy()
print(json.dumps(time.perf_counter() - started))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="Qwen3-8B:4,Qwen3-32B:8", help="name:tp, comma-separated")
    parser.add_argument("--target", default="ascend910b")
    parser.add_argument("--layers", default="36,61", help="depths for loading against tracing")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, object] = {"compile": {}, "load_against_trace": {}}
    with tempfile.TemporaryDirectory() as work:
        for model in filter(None, args.models.split(",")):
            found["compile"][model] = compile_model(Path(work), *model.split(":"), args.target)  # type: ignore[index]
        for depth in filter(None, args.layers.split(",")):
            found["load_against_trace"][depth] = load_against_trace(Path(work), int(depth), args.repeat)  # type: ignore[index]
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def compile_model(work: Path, model: str, tp: str, target: str) -> object:
    source = work / model
    source.mkdir()
    shutil.copy(CONFIGS / f"{model}.json", source / "config.json")
    command = ["compile", "--model", source, "--tp", tp, "--target", target, "--output", work / f"{model}-out"]
    graphs = json.loads(msconv(*command, "--json"))["graphs"]
    for g in graphs:
        g["bytes"] = Path(g["path"]).stat().st_size
        print(
            f"{model} tp {tp} {target} {g['phase']}: {g['nodes']} nodes, {g['bytes'] / 2**20:.2f} MiB, "
            f"{g['seconds']:.1f} s, peak {g['peak_rss_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )
    return graphs


def load_against_trace(work: Path, layers: int, repeat: int) -> object:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    source, artifact = work / f"small-{layers}", work / f"small-{layers}-tp1"
    skip = {"architectures", "model_type", "torch_dtype", "rope_theta"}
    config = Qwen3Config(**{k: v for k, v in SMALL.items() if k not in skip}, num_hidden_layers=layers)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(source)
    msconv("convert", "--model", source, "--tp", "1", "--output", artifact)
    msconv("compile", artifact, "--target", "cpu")
    times: dict[str, list[float]] = {"load": [], "trace": []}
    for _ in range(repeat):
        for way, code in (("load", LOAD), ("trace", TRACE)):
            done = subprocess.run([sys.executable, "-c", code, artifact], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            times[way].append(json.loads(done.stdout.splitlines()[-1]))
    load, trace = statistics.median(times["load"]), statistics.median(times["trace"])
    print(f"{layers} layers, both phases: load {load:.2f} s, trace {trace:.2f} s: {trace / load:.1f}x", flush=True)
    return {**times, "ratio": trace / load}


def msconv(*args: object) -> str:
    command = [sys.executable, "-m", "msconv", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()

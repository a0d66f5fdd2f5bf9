"""The rehearsal device under torch_npu's name: "npu" is a device of PyTorch, and no kernel of an NPU exists.

torch itself loads this (entry point torch.backends), as it loads the real one.  Whoever calls a kernel of an NPU
gets NotImplementedError with its name.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .settings import SETTINGS

# Whoever imports this before torch must not have torch import it once more.
_autoload_before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch  # noqa: E402

if _autoload_before is None:
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
else:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_before

KERNELS = (
    *(
        "_npu_reshape_and_cache",
        "npu_add_rms_norm",
        "npu_dynamic_quant",
        "npu_format_cast",
        "npu_fusion_attention",
    ),
    *("npu_fused_infer_attention_score", "npu_gemma_rms_norm", "npu_interleave_rope", "npu_kv_rmsnorm_rope_cache"),
    *("npu_mrope", "npu_quantize", "npu_rms_norm", "npu_rotary_mul", "npu_scatter_nd_update_", "npu_swiglu"),
)

torch.ops.load_library(SETTINGS.library)
torch.utils.rename_privateuse1_backend("npu")
torch.ops.rehearsal.start(SETTINGS.devices, SETTINGS.memory_bytes)

from . import npu  # noqa: E402  needs the library

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_packed_sequence=False, for_storage=True)


def missing(name: str) -> Callable[..., Any]:
    """A function in a kernel's place."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}: a kernel of the NPU, which the rehearsal device does not have")

    call.__name__ = name
    return call


def _module(name: str, **values: Any) -> Any:
    module = types.ModuleType(f"{__name__}.{name}")
    module.__dict__.update(values)
    sys.modules[module.__name__] = module
    return module


class _Activity:
    NPU = torch.profiler.ProfilerActivity.PrivateUse1
    CPU = torch.profiler.ProfilerActivity.CPU


class _ProcessGroupHCCL:
    class Options:
        def __init__(self) -> None:
            self.hccl_config: dict[str, Any] = {}


def _apply_patches(patches: list[tuple[str, Any]]) -> None:
    """Put values at dotted names of torch, as the real one does for SGLang."""
    for path, value in patches:
        *parents, last = path.split(".")
        owner: Any = torch
        for name in parents:
            owner = getattr(owner, name)
        setattr(owner, last, value)


globals().update({name: missing(name) for name in KERNELS})
sys.modules["torch.npu"] = sys.modules[f"{__name__}.npu"] = npu
profiler = _module(
    "profiler",
    profile=torch.profiler.profile,
    ProfilerActivity=_Activity,
    tensorboard_trace_handler=missing("tensorboard_trace_handler"),
)
multiprocessing = _module("multiprocessing")
multiprocessing.reductions = _module(
    "multiprocessing.reductions", rebuild_npu_tensor=missing("rebuild_npu_tensor")
)
_C = _module("_C", _weak_ref_tensor=lambda tensor: tensor)
_C._distributed_c10d = _module("_C._distributed_c10d", ProcessGroupHCCL=_ProcessGroupHCCL)
contrib = _module("contrib", __path__=[str(Path(__file__).parent / "contrib")])

from . import hccl, on_import, processes  # noqa: E402, F401  need the device


def _drafts(name: str) -> Callable[..., None]:
    """A kernel of speculative decoding, imported when it is called."""

    def call(*args: Any, **kwargs: Any) -> None:
        from sgl_kernel_npu import drafts

        getattr(drafts, name)(*args, **kwargs)

    return call


for _name in ("build_tree_kernel_efficient", "cache_loc_update"):
    setattr(torch.ops.npu, _name, _drafts(_name))


def _autoload() -> None:
    """The entry point: importing this module has done it all."""

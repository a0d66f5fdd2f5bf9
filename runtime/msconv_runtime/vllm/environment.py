"""The environment of vLLM's processes on a CPU."""

from __future__ import annotations

import os
import socket

VERSIONS = ("0.32.0",)  # versions of vLLM
LOOPBACK = "127.0.0.1"


def server_environment(ranks: int) -> dict[str, str]:
    """What a server of so many ranks gets beside this process's environment, unless the user has set it."""
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the one that was tried: the other wants Triton
        "VLLM_MLA_DISABLE": "1",  # vLLM's own latent attention, whose blocks and limits the graphs do not share
        "VLLM_HOST_IP": LOOPBACK,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share the cores of a machine; msconv's kernels divide them
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch_npu, where it is installed, would want CANN
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if ranks > 1:
        environment["GLOG_v"] = "3"  # MindSpore says hundreds of times that it waits for the other ranks
        if any(name == "lo" for _, name in socket.if_nameindex()):
            environment["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in environment.items() if name not in os.environ}


def use_cpu(tp: int = 1) -> None:
    """Make this process, and what it starts, fit for vLLM on a CPU: what `msconv serve` sets for a server.  Call
    it before vllm is imported."""
    os.environ.update(server_environment(tp))

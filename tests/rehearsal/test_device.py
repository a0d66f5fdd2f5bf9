"""The rehearsal device by itself: to torch a device like others, whose memory the host cannot touch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msconv.rehearsal.build import build_device
from msconv.rehearsal.protocol import Device
from msconv.rehearsal.server import environment, last_error, prepare
from tests.commands import Result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MEMORY = 64 << 20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("device")
    prepare(directory, Device(str(build_device()), 2, MEMORY, "Ascend910B2", 2201, True))
    return directory


def run(work: Path, code: str) -> Result:
    """Python with the stand-ins on its path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(work, os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_operators_copies_and_views_are_those_of_the_cpu(work: Path) -> None:
    done = run(
        work,
        """
import torch
torch.manual_seed(0)
a, b = torch.randn(5, 7), torch.randn(7, 3)
x, y = a.npu(), b.to("npu:1").to("npu:0")
assert x.device.type == "npu" and torch.npu.device_count() == 2
assert torch.equal((x @ y).cpu(), a @ b)
assert torch.equal(x[1:4, ::2].contiguous().cpu(), a[1:4, ::2])
x[2] = 7
x.index_put_((torch.tensor([0]).npu(),), torch.zeros(7).npu())
a[2], a[0] = 7, 0
assert torch.equal(x.cpu(), a)
assert x[2, 3].item() == 7 and float(x.sum()) == float(a.sum())
z = torch.zeros(4, dtype=torch.int64, device="npu")
z.resize_(9)[4:] = 1
assert z.cpu().tolist()[4:] == [1] * 5
pinned = torch.empty(4, pin_memory=True)
event, stream = torch.npu.Event(), torch.npu.Stream()
with torch.npu.stream(stream):
    event.record()
event.synchronize()
back = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x[1:]))
assert back.device.type == "npu" and torch.equal(back.cpu(), a[1:])
print("fine")
""",
    )
    assert done.stdout == "fine\n", done.stderr


def test_memory_is_counted_limited_and_given_back(work: Path) -> None:
    done = run(
        work,
        f"""
import torch
free, total = torch.npu.mem_get_info()
assert total == {MEMORY}
x = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
assert torch.npu.memory_allocated() >= 1 << 20
del x
assert torch.npu.mem_get_info()[0] == free and torch.npu.max_memory_allocated() >= 1 << 20
try:
    torch.empty(total + 1, dtype=torch.uint8, device="npu")
except RuntimeError as e:
    print(e)
""",
    )
    assert "rehearsal device: out of memory" in done.stdout, done.stderr


def test_the_host_cannot_touch_device_memory(work: Path, tmp_path: Path) -> None:
    """The process ends, and its log names the place."""
    done = run(
        work,
        """
import ctypes, faulthandler, torch
from torch_npu.graphs import _watch_faults
x = torch.ones(1000, device="npu")
try:
    x.numpy()
except TypeError:
    print("torch refuses .numpy() by itself")
_watch_faults()
def hidden_read():
    return ctypes.string_at(x.data_ptr(), 4)
hidden_read()
print("read")
""",
    )
    assert done.stdout == "torch refuses .numpy() by itself\n"
    assert done.code < 0
    log = tmp_path / "log"
    log.write_text(done.stderr)
    assert last_error(log).startswith("the host touched device memory, at ")
    assert "hidden_read" in last_error(log)


def test_a_host_view_opens_the_memory_as_long_as_it_lives(work: Path) -> None:
    done = run(
        work,
        """
import ctypes, torch
x = torch.arange(1000, dtype=torch.float32).npu()
view = torch.ops.rehearsal.host_view(x[10:])
view[0] = 5
assert ctypes.cast(x.data_ptr() + 40, ctypes.POINTER(ctypes.c_float))[0] == 5
assert x[10].item() == 5
del view
print("closed", flush=True)
ctypes.string_at(x.data_ptr(), 1)
""",
    )
    assert done.stdout == "closed\n"
    assert done.code < 0


def test_kernels_of_an_npu_say_that_there_are_none(work: Path) -> None:
    done = run(
        work,
        """
import torch, torch_npu
import sgl_kernel_npu.attention.any_name as kernels
for kernel in (torch_npu.npu_rms_norm, kernels.whatever):
    try:
        kernel(1)
    except NotImplementedError as e:
        print(e)
""",
    )
    assert done.stdout.count("which the rehearsal device does not have") == 2, done.stderr


def test_outside_a_rehearsal_the_stand_in_refuses(work: Path) -> None:
    without = {k: v for k, v in environment(work, os.environ).items() if k != "MSCONV_REHEARSAL"}
    done = subprocess.run([sys.executable, "-c", "import torch_npu"], env=without, capture_output=True, text=True)
    assert done.returncode != 0
    assert "msconv rehearse" in done.stderr

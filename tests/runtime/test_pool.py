"""Memory of SGLang's pools on a CPU: reserved first, its pages given while the server is idle."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from msconv_runtime.sglang import pool  # noqa: E402

SIZE = 256 << 20


def resident() -> int:
    (line,) = (li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("at_once", [0, SIZE * 2])
def test_large_tensors_are_reserved_and_populated_later(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "AT_ONCE", at_once)
    before, zeros = resident(), torch.zeros
    with pool.reserved_zeros():
        large = torch.zeros((4, SIZE // 16), dtype=torch.float32, device="cpu")
        small = torch.zeros(3, 5, dtype=torch.int64)
        also = torch.zeros([2, 2])
    assert torch.zeros is zeros
    assert resident() - before < SIZE // 4
    assert large.shape == (4, SIZE // 16)
    assert (small.shape, small.dtype, also.shape) == ((3, 5), torch.int64, (2, 2))
    large[2, 5] = 7.0
    pool.populate_reserved()
    for thread in threading.enumerate():
        if thread.name == "msconv-pool":
            thread.join()
    assert resident() - before > SIZE * 3 // 4
    assert float(large.sum()) == 7.0
    pool.populate_reserved()  # nothing is left to do
    assert all(t.name != "msconv-pool" for t in threading.enumerate())


def test_no_pages_are_given_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "AT_ONCE", 0)
    before = resident()
    with pool.reserved_zeros():
        large = torch.zeros((SIZE // 4,), dtype=torch.float32, device="cpu")
    with pool.at_work():
        pool.populate_reserved()
        (thread,) = (t for t in threading.enumerate() if t.name == "msconv-pool")
        thread.join(5 * pool.IDLE_S)
        assert thread.is_alive()
        assert resident() - before < SIZE // 4
    thread.join()
    assert resident() - before > SIZE * 3 // 4
    assert float(large.sum()) == 0.0


def test_an_error_inside_leaves_torch_as_it_was() -> None:
    zeros = torch.zeros
    with pytest.raises(ValueError, match="inside"), pool.reserved_zeros():
        raise ValueError("inside")
    assert torch.zeros is zeros

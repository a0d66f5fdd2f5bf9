"""Bounds are the work over published rates, and never more than what can be known."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from msconv.mindir.bounds import bound, link_seconds, moved_bytes
from msconv.mindir.shapes import Batch
from msconv.mindir.work import Experts, Work, total
from msconv_runtime.errors import UsageError
from msconv_runtime.targets import TARGETS, Figures, figures_named

RATES = Figures("test", 1e12, 100e12, 200e12, 100e9, 10e9, 8, (("a test", "nowhere"),))
READS = Work("MatMul", 0, 1, weight_bytes=3e9, operations=1e11)
MULTIPLIES = Work("QuantBatchMatmul", 0, 1, weight_bytes=1e9, operations=1e12, type="int8")
SUMS = Work("AllReduce", 0, 1, moved_bytes=10**8)
DONE = [(READS, 2), (MULTIPLIES, 1), (SUMS, 1)]


def test_each_part_is_work_over_rate_and_the_largest_bounds() -> None:
    found = bound(total(DONE), DONE, RATES, tp=4)
    assert found.memory == pytest.approx(7e9 / 1e12)
    assert found.compute == pytest.approx(2e11 / 100e12 + 1e12 / 200e12)
    assert found.link == pytest.approx(2 * 3 / 4 * 1e8 / 100e9)
    assert (found.seconds, found.by, found.unknown) == (found.memory, "memory", [])


def test_node_after_node_each_node_is_bound_by_what_it_waits_for() -> None:
    found = bound(total(DONE), DONE, RATES, tp=4)
    assert found.one_after_another == pytest.approx(2 * 3e-3 + 5e-3 + 1.5e-3)
    assert found.seconds is not None
    assert found.one_after_another >= found.seconds


def test_a_part_without_a_figure_is_refused_and_the_others_still_bound() -> None:
    found = bound(total(DONE), DONE, replace(RATES, link_bytes_per_s=None, int8_ops_per_s=None), tp=4)
    assert (found.compute, found.link, found.one_after_another) == (None, None, None)
    assert (found.seconds, found.unknown) == (found.memory, ["compute", "link"])
    nothing = replace(
        RATES, memory_bytes_per_s=None, half_ops_per_s=None, int8_ops_per_s=None, link_bytes_per_s=None
    )
    assert bound(total(DONE), DONE, nothing, tp=4).seconds is None


def test_what_is_not_asked_of_a_device_needs_no_figure() -> None:
    found = bound(total([(READS, 1)]), [(READS, 1)], replace(RATES, link_bytes_per_s=None, int8_ops_per_s=None), 1)
    assert found.unknown == []
    assert found.link == 0


def test_ranks_on_several_machines_are_bound_by_what_joins_the_machines() -> None:
    sums = Counter({("AllReduce", 10**9): 1})
    assert link_seconds(sums, RATES, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9)
    assert link_seconds(sums, RATES, 32) == pytest.approx(2 * 3 / 4 * 1e9 / 8 / 10e9)
    assert link_seconds(Counter({("AllGather", 10**9): 2}), RATES, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9)
    assert link_seconds(sums, replace(RATES, outer_bytes_per_s=None), 32) is None
    assert moved_bytes(sums, 8) == 2 * 7 / 8 * 1e9


def test_experts_are_reached_as_often_as_even_routing_reaches_them() -> None:
    of_all = Experts(16)
    assert of_all.reached(16, 4, 1) == pytest.approx(4)
    assert of_all.reached(4, 4, 1) == pytest.approx(1)  # one of four ranks
    assert of_all.reached(16, 4 * 1000, 1000) == pytest.approx(16)


def test_new_tokens_see_those_before_them() -> None:
    assert Batch(2, 1, 10).seen == 20
    assert Batch(1, 4, 4).seen == 1 + 2 + 3 + 4
    assert Batch(3, 2, 10).seen == 3 * (9 + 10)


def test_every_figure_has_a_source_and_is_within_reason() -> None:
    """No device is known that moves more than 10 TB/s or multiplies more than 10 P a second."""
    figures = [f for t in TARGETS.values() for f in t.figures]
    assert {f.device for f in figures} >= {"910B2", "910B3", "910B4", "910C", "310P"}
    for f in figures:
        rates = (f.memory_bytes_per_s, f.half_ops_per_s, f.int8_ops_per_s, f.link_bytes_per_s, f.outer_bytes_per_s)
        assert bool(f.sources) == any(rates), f.device
        assert all(address.startswith("https://") for _, address in f.sources)
        assert all(rate is None or (1e9 < rate < 1e16 and math.isfinite(rate)) for rate in rates)


@pytest.mark.parametrize("name", ["910B3", "910b3", "Ascend910B3", "Ascend 910B3"])
def test_a_device_is_found_in_any_spelling(name: str) -> None:
    target, figures = figures_named(name)
    assert (target.name, figures.device) == ("ascend910b", "910B3")


def test_a_target_names_a_device_only_if_it_has_one() -> None:
    assert figures_named("ascend910c")[1].device == "910C"
    with pytest.raises(UsageError) as refused:
        figures_named("ascend910b")
    assert "910B2" in refused.value.hint

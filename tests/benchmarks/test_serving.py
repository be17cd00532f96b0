"""The serving benchmark's queues on made-up costs: nothing is lost, and the ways differ as they must."""

from __future__ import annotations

import math

import pytest

from benchmarks import serving

#: a device that a batch of one leaves idle by two thirds
COSTS = serving.Costs(
    {n: 0.008 + 0.004 * n for n in range(1, 9)}, {n: 0.008 + 0.004 * n for n in range(1, 9)}, 0.003, 0.01
)


@pytest.mark.parametrize("name", sorted(serving.WAYS))
@pytest.mark.parametrize("burst", [1, 5])
def test_every_request_is_served_once_and_in_order(name: str, burst: int) -> None:
    requests = serving.arrivals(120, 2.0, 3, (4, 9, 30), burst)
    served = serving.WAYS[name](COSTS, requests)
    assert [r.steps for r in served.requests] == [r.steps for r in requests]
    for request in served.requests:
        assert request.at <= request.began < request.done < math.inf
    steps = sum(r.steps for r in requests)
    assert served.rows == steps * (2 if name == "step-cfg" else 1)
    found = serving.figures(served)
    assert found["latency"]["p50"] <= found["latency"]["p95"] <= found["latency"]["p99"]
    assert (found["padding_share"] > 0) == (name == "step-buckets")


def test_short_requests_do_not_wait_for_long_ones_and_cfg_takes_twice_the_rows() -> None:
    found = serving.queues(COSTS, 80)["8, 20 or 50 steps"]
    cell = found["loads"]["Poisson, 80%"]
    assert (
        cell["step"]["latency_by_steps"]["8 or fewer"]["p95"] < cell["whole"]["latency_by_steps"]["8 or fewer"]["p95"]
    )
    capacity = found["capacity"]
    assert capacity["step"] > 1.5 * capacity["step-cfg"] and capacity["step"] > 1.5 * capacity["one"]

"""A model that a redeploy replaces: its requests end with a hint, and no token is mixed."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from cluster.errors import ModelReplacedError
from cluster.transport.base import Call
from tests.cluster_fixture import wait_until
from tests.local_cluster import MODEL, LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of


@pytest.mark.parametrize("when", ["in a layer", "between steps", "parked"])
def test_requests_of_a_replaced_model_end_at_once_with_a_hint(
    cluster: LocalCluster, when: str
) -> None:
    begun = threading.Event()
    withdrawn = replace(cluster.placement, version=99).without_models({MODEL})

    def withdraw(call: Call, number: int) -> None:
        if number == 20:
            begun.set()
            if when == "in a layer":
                cluster.view.publish(withdrawn)

    cluster.transport.fail = withdraw
    if when == "parked":
        cluster.lose([(0, expert_id) for expert_id in range(8)])
    requests = [greedy_request(f"r{i}", prompt_of(4, i), 200) for i in range(3)]
    for request in requests:
        cluster.engine.submit(request)
    if when == "parked":
        wait_until(lambda: len(cluster.scheduler.parked()) == 3, "all are parked", 20)
    else:
        assert begun.wait(20)
    cluster.view.publish(withdrawn)
    for request in requests:
        with pytest.raises(ModelReplacedError) as caught:
            cluster.result(request)
        assert caught.value.retry_after_s == 1.0
    with pytest.raises(ModelReplacedError):
        cluster.generate(greedy_request("late", prompt_of(4, 1), 2))
    # A redeploy back to it serves it again.
    cluster.view.publish(replace(cluster.placement, version=101))
    [[event]] = cluster.generate(greedy_request("again", prompt_of(4, 1), 2))
    assert len(event.token_ids) == 2

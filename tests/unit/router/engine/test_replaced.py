"""A model that a redeploy replaces: its requests end with a hint, and no token is mixed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ExpertUnavailableError, ModelReplacedError
from cluster.placement.placement import empty_placement
from cluster.spec import ModelExperts
from cluster.transport.base import Call
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import wait_until
from tests.local_cluster import MODEL, LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

OTHER = ModelExperts("other", (0,), 1, 1)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    save_mixtral(tmp_path)
    cluster = LocalCluster(tmp_path)
    yield cluster
    cluster.close()


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
    requests = [greedy_request(f"r{i}", prompt_of(4, i), 9) for i in range(3)]
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=200)) for r in requests]
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


def test_a_model_that_the_placement_has_not_had_yet_is_waited_for(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    cluster = LocalCluster(tmp_path)
    cluster.view.placement, cluster.view.models = empty_placement(0, [OTHER]), frozenset()
    try:
        request = greedy_request("r", prompt_of(4, 1), 2)
        cluster.engine.submit(request)
        with pytest.raises(ExpertUnavailableError, match="no placement"):
            cluster.generate(greedy_request("short", prompt_of(4, 1), 2, timeout_s=0.2))
        cluster.view.publish(cluster.placement)
        [event] = cluster.result(request)
        assert len(event.token_ids) == 2
    finally:
        cluster.close()

"""Other weights are deployed under the same id, and no actor has memory for both models.

:mod:`tests.fault.test_redeploy` has the redeploy with memory for both.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import UnavailableError
from router.client import Client
from router.retry import RetryPolicy
from tests.cluster_fixture import RANDOM, ServedCluster, greedy, transformers_tokens, wait_until
from tests.fault.faults import PROMPTS
from tests.fault.test_redeploy import BACK_S, LONG, SHORT, STREAMS, Streams, deploy
from tests.quantise import MIXTRAL, make


@pytest.mark.timeout(400)
def test_without_memory_for_both_old_requests_end_with_a_hint_and_a_retry_is_the_new_models(
    served: ServedCluster, tmp_path: Path
) -> None:
    other = make(MIXTRAL, tmp_path, seed=5)
    budget = int(1.01 * max(actor.weight_bytes for actor in served.status().actors))
    deploy(served, served.random_folder, memory_budget_bytes=budget).result(BACK_S)
    served.wait_whole(BACK_S)
    old = [transformers_tokens(served.oracle, prompt, LONG) for prompt in PROMPTS]
    new = [transformers_tokens(other.oracle, prompt, LONG) for prompt in PROMPTS]
    streams, retrying = Streams(served), Client(served.grpc_address, retry=RetryPolicy())
    with ThreadPoolExecutor(STREAMS) as pool, retrying:
        retrying.model_info()
        readers = [pool.submit(streams.read, worker) for worker in range(STREAMS)]
        deployed = deploy(served, other.folder, memory_budget_bytes=budget)
        try:
            wait_until(lambda: any(s.error for s in streams.came), "memory is short", BACK_S)
            [reply] = retrying.generate(PROMPTS[0], greedy(LONG), model=RANDOM, timeout_s=BACK_S)
            assert reply.token_ids == new[0]
            deployed.result(BACK_S)
        finally:
            streams.ended.set()
        for reader in readers:
            reader.result()
    for stream in streams.came:
        if stream.error is None:
            assert stream.token_ids in (old[stream.place], new[stream.place])
            continue
        assert isinstance(stream.error, UnavailableError)
        assert stream.error.retry_after_s is not None
        assert stream.token_ids == old[stream.place][: len(stream.token_ids)]
    served.wait_whole(BACK_S)
    deploy(served, served.random_folder).result(BACK_S)
    served.wait_whole(BACK_S)
    [reply] = served.client.generate(PROMPTS[0], greedy(SHORT), model=RANDOM)
    assert reply.token_ids == old[0][:SHORT]

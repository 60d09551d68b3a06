"""Other experts are deployed under a mixture's id while requests run: no answer is of both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ray import serve

from experts.checkpoint.mixture import open_mixture
from router.app import build
from tests.cluster_fixture import APP, ServedCluster, wait_until
from tests.local_mixture import LocalMixture
from tests.mixture_cluster import RTOL, UNLIKE, Inputs, Mixtures, rows_of, served_mixtures
from tests.mixtures import save_unlike


@pytest.fixture(scope="module")
def mixtures(
    served_session: ServedCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mixtures]:
    with served_mixtures(served_session, tmp_path_factory.mktemp("mixtures")) as served:
        yield served


@pytest.mark.timeout(400)
def test_other_experts_under_the_same_id_give_whole_answers_of_either(
    mixtures: Mixtures, tmp_path: Path
) -> None:
    served = mixtures.served
    other_folder = save_unlike(tmp_path / "other", seed=11)
    other = LocalMixture(open_mixture(other_folder))
    models = [
        {**model, "path": str(other_folder)} if model["id"] == UNLIKE else model
        for model in served.args["models"]
    ]
    inputs = rows_of(UNLIKE, 20, 5)
    old, new = (m.predict(inputs)["value"] for m in (mixtures.local[UNLIKE], other))
    counts = {"old": 0, "new": 0}
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            got = served.client.predict(UNLIKE, inputs, timeout_s=60).outputs["value"]
            is_old = bool(np.isclose(got, old, RTOL, RTOL).all())
            assert is_old or np.isclose(got, new, RTOL, RTOL).all()
            counts["old" if is_old else "new"] += 1

    def until(name: str, count: int) -> None:
        wanted = counts[name] + count
        wait_until(lambda: counts[name] >= wanted, f"{name} answers", 90)

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(ask) for _ in range(2)]
        try:
            until("old", 10)
            deployed = pool.submit(
                serve.run, build({**served.args, "models": models}), name=APP, route_prefix="/"
            )
            until("new", 10)
            deployed.result(90)
        finally:
            ended.set()
    for worker in workers:
        worker.result()
    serve.run(build(served.args), name=APP, route_prefix="/")
    wait_until(lambda: _is_old(served, inputs, old), "the first mixture is back", 90)


def _is_old(served: ServedCluster, inputs: Inputs, old: np.ndarray) -> bool:
    got = served.client.predict(UNLIKE, inputs).outputs["value"]
    return bool(np.isclose(got, old, RTOL, RTOL).all())

"""Mixtures beside the language models of the session's cluster, and clients that check answers.

Every answer is compared with that of one process: bit for bit where all experts are our own, and
within :data:`RTOL` where libraries compute, whose rounding follows the number of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experts.checkpoint.mixture import open_mixture
from router.client import Client
from tests.cluster_fixture import ServedCluster, deploy, wait_until
from tests.local_mixture import LocalMixture
from tests.mixture_guide import MODEL as PIECES
from tests.mixture_guide import fit_by_guide
from tests.mixtures import (
    NUM_FEATURES,
    fitted_estimator,
    save_given,
    save_sequences,
    save_tree,
    save_unlike,
)

CLIENTS, MAX_ROWS = 4, 40
RTOL = 1e-12
REPLACED_S = 60.0
UNLIKE, GIVEN, TREE, SEQUENCES, FITTED = "unlike", "given", "tree", "sequences", "fitted"
NUM_EXPERTS = {UNLIKE: 8, GIVEN: 4, TREE: 5, SEQUENCES: 3, FITTED: 3, PIECES: 4}
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Mixtures:
    """A cluster that serves mixtures too, and each mixture in this process."""

    served: ServedCluster
    folders: Mapping[str, Path]
    local: Mapping[str, LocalMixture]

    def check(self, model: str, inputs: Inputs, client: Client | None = None) -> None:
        """Predict, and compare with one process."""
        got = (client or self.served.client).predict(model, inputs, timeout_s=60)
        assert got.exact
        expected = self.local[model].predict(inputs)
        assert got.outputs.keys() == expected.keys()
        for name, array in expected.items():
            assert got.outputs[name].dtype.kind == array.dtype.kind
            if model in (UNLIKE, FITTED) and name == "value":
                np.testing.assert_allclose(got.outputs[name], array, rtol=RTOL, atol=RTOL)
            else:
                np.testing.assert_array_equal(got.outputs[name], array)


@contextmanager
def served_mixtures(cluster: ServedCluster, folder: Path) -> Iterator[Mixtures]:
    """Deploy mixtures beside the language models, until another test needs these alone."""
    folders = {
        UNLIKE: save_unlike(folder / UNLIKE),
        GIVEN: save_given(folder / GIVEN, 3, fragile=True),
        TREE: save_tree(folder / TREE),
        SEQUENCES: save_sequences(folder / SEQUENCES),
        FITTED: folder / FITTED,
        PIECES: fit_by_guide(folder / "guide"),
    }
    fitted_estimator().save(folders[FITTED])
    models = [{"id": name, "path": str(path)} for name, path in folders.items()]
    args = {**cluster.args, "models": [*cluster.args["models"], *models]}
    served = replace(cluster, args=args)
    deploy(args)
    cluster.changed.clear()
    served.wait_whole()
    local = {name: LocalMixture(open_mixture(path)) for name, path in folders.items()}
    yield Mixtures(served, folders, local)
    cluster.changed.set()


def rows_of(model: str, num_rows: int, seed: int) -> Inputs:
    source = np.random.default_rng(seed)
    if model == SEQUENCES:
        steps = 1 + seed % 7
        return {"x": source.normal(size=(num_rows, steps, 3)).astype(np.float32)}
    if model == PIECES:
        return {"x": source.uniform(-2, 2, size=(num_rows, 2)), "y": np.zeros((num_rows, 1))}
    inputs = {"x": source.normal(size=(num_rows, NUM_FEATURES))}
    if model == GIVEN:
        inputs["expert"] = source.integers(0, 3, size=(num_rows, 1))
    if model == TREE:
        inputs["y"] = source.normal(size=(num_rows, 1))
    return inputs


class Load:
    """Clients that predict with all mixtures in turn, and compare every answer."""

    def __init__(self, mixtures: Mixtures, mixture: str | None, client: Client | None) -> None:
        self._mixtures, self._client = mixtures, client
        self._names = [mixture] if mixture else [*NUM_EXPERTS]
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.answers = 0

    def ask(self, worker: int) -> None:
        seed = worker
        while not self._ended.is_set():
            model = self._names[seed % len(self._names)]
            self._mixtures.check(model, rows_of(model, 1 + seed % MAX_ROWS, seed), self._client)
            seed += CLIENTS
            with self._lock:
                self.answers += 1

    def more(self, count: int, timeout_s: float = REPLACED_S) -> None:
        """Wait for so many further answers."""
        wanted = self.answers + count
        wait_until(lambda: self.answers >= wanted or self._ended.is_set(), "answers", timeout_s)

    def end(self) -> None:
        self._ended.set()


@contextmanager
def loaded(
    mixtures: Mixtures, mixture: str | None = None, client: Client | None = None
) -> Iterator[Load]:
    load = Load(mixtures, mixture, client)
    with ThreadPoolExecutor(CLIENTS) as pool:
        workers = [pool.submit(load.ask, worker) for worker in range(CLIENTS)]
        try:
            yield load
        finally:
            load.end()
    for worker in workers:
        worker.result()

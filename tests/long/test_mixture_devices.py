"""Requests for the experts of different devices do not wait for each other: emulated devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from ray import serve

from benchmarks.shipped import free_ports, with_ports
from router.app import build
from tests.cluster_fixture import ServedCluster, wait_until
from tests.mixtures import NUM_FEATURES, save_given

EMULATED = "emulated"
DEVICES = 8
BATCH_S = 0.2
REQUESTS = 20
BACK_S = 90.0
SHARE = 0.95


@contextmanager
def emulated_devices(served: ServedCluster, folder: Path) -> Iterator[str]:
    """Deploy a mixture of an expert a device as a second application; gives its URL."""
    args = {
        "models": [{"id": "given", "path": str(save_given(folder, DEVICES))}],
        "experts": {"actors": DEVICES, "emulate": {"batch_s": BATCH_S}},
    }
    http_port, grpc_port = free_ports(2)
    serve.run(build(with_ports(args, http_port, grpc_port)), name=EMULATED, route_prefix=None)
    url = f"http://127.0.0.1:{http_port}/v2/models/given/infer"
    try:
        with httpx.Client(timeout=BACK_S) as client:
            wait_until(lambda: _ask(client, url, 0).is_success, "it answers", BACK_S)
        yield url
    finally:
        serve.delete(EMULATED)
        served.wait_whole()


def _ask(client: httpx.Client, url: str, expert: int) -> httpx.Response:
    data = [0.0] * NUM_FEATURES
    inputs = [
        {"name": "x", "datatype": "FP64", "shape": [1, NUM_FEATURES], "data": data},
        {"name": "expert", "datatype": "INT64", "shape": [1, 1], "data": [expert]},
    ]
    return client.post(url, json={"inputs": inputs})


def took_s(url: str, experts: range) -> float:
    """Return how long so many clients take, each of which asks for one expert again and again."""

    def ask(expert: int) -> None:
        with httpx.Client(timeout=BACK_S) as client:  # making one takes longer than a request
            for _ in range(REQUESTS):
                assert _ask(client, url, expert).status_code == 200

    threads = [threading.Thread(target=ask, args=(expert,)) for expert in experts]
    started_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - started_s


@pytest.mark.timeout(300)
def test_eight_devices_do_the_work_of_eight(served: ServedCluster, tmp_path: Path) -> None:
    with emulated_devices(served, tmp_path) as url:
        took_s(url, range(DEVICES))  # processes that have just started still import, and connect
        one_s, all_s = took_s(url, range(1)), took_s(url, range(DEVICES))
    print(f"one device {one_s:.2f} s, {DEVICES} devices {all_s:.2f} s")
    assert one_s >= REQUESTS * BATCH_S
    assert DEVICES * one_s / all_s >= SHARE * DEVICES

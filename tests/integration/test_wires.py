"""A few hundred wires of ``benchmarks.wires`` at the running cluster, which must not show."""

from __future__ import annotations

from urllib.parse import urlsplit

import psutil
import pytest

from benchmarks.fuzzing.hostile import http2_call, said
from benchmarks.wires import CANARY_EVERY, FAILURES, Canaries, bombard, pids_of, places_of
from router.client import Client
from tests.cluster_fixture import APP, TINY, ServedCluster

HIDDEN_SIZE = 192
WIRES, SEED = 240, 1
GROWTH_MB = 64
"""Of a process: caches fill, and code is compiled, in the first hundreds of requests."""


def resident_mb(pids: dict[str, list[int]]) -> dict[int, float]:
    """Return the memory of each process."""
    return {
        pid: psutil.Process(pid).memory_info().rss / 1e6 for group in pids.values() for pid in group
    }


def test_hundreds_of_mutated_wires_change_no_answer_and_end_no_process(
    served: ServedCluster,
) -> None:
    http_port, grpc_port = urlsplit(served.http_url).port, int(served.grpc_address.split(":")[1])
    assert http_port is not None
    status = served.status()
    places = places_of(status, APP, TINY, HIDDEN_SIZE, http_port, grpc_port)
    assert len(places.actors) == len(status.actors)
    assert places.ports
    canaries = Canaries(served.client, TINY, http_port)
    pids = pids_of(status)
    before_mb = resident_mb(pids)

    came, fared = bombard(places, canaries, WIRES, SEED, lambda sent: None)

    assert fared == {"exact": WIRES // CANARY_EVERY}
    assert pids_of(served.status()) == pids
    assert {sum(codes.values()) for codes in came.values()} == {WIRES // len(came)}
    assert not {code for codes in came.values() for code in codes} & FAILURES
    # They went where they were meant to go.
    assert "400" in came["HTTP body"]
    assert "INVALID_ARGUMENT" in came["gRPC message"]
    assert "FrameError" in came["frame by Ray"]
    assert "FrameError" in came["stream, with a key"]
    grown = {pid: mb - before_mb[pid] for pid, mb in resident_mb(pids).items()}
    assert max(grown.values()) < GROWTH_MB
    assert served.running() == 0


@pytest.mark.parametrize("method", ["/expertmesh.v1\xffInference/Generate", "\xff", "/\xc3(/x"])
def test_a_call_whose_method_is_no_text_ends_no_server(served: ServedCluster, method: str) -> None:
    port = int(served.grpc_address.split(":")[1])
    pids = pids_of(served.status())
    said(("127.0.0.1", port), http2_call(method, b""))
    with Client(served.grpc_address, retry=None) as client:  # over a connection of its own
        assert pids_of(client.status()) == pids

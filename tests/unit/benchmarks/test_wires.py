"""The verdict over a bombardment, and that its good wires are good and its bad ones told apart."""

from __future__ import annotations

import socket
import threading
from copy import deepcopy
from typing import Any

import pytest

from benchmarks.fuzzing import hostile
from benchmarks.fuzzing.wires import FRAMES, joined, message
from benchmarks.wires import problems

GOOD: dict[str, Any] = {
    "count": 2,
    "came": {"HTTP body": {"200": 1, "400": 1}, "frame by Ray": {"FrameError": 2, "rows": 1}},
    "canaries": {"exact": 4},
    "pids_before": {"actors": [1, 2]},
    "pids_after": {"actors": [1, 2]},
    "processes": [
        {"name": "a", "pid": 1, "is_flat": True, "mb_per_min": 0.0, "descriptors_per_min": 0.0}
    ],
}


def test_a_run_without_a_trace_of_the_wires_has_no_problem() -> None:
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"canaries": {"exact": 3, "wrong": 1}}, "a canary: wrong"),
        ({"canaries": {"exact": 3, "ConnectionError: gone": 1}}, "a canary: ConnectionError: gone"),
        ({"canaries": {}}, "no canary was answered"),
        ({"pids_after": {"actors": [1, 3]}}, "pids were"),
        ({"came": {"gRPC message": {"INTERNAL": 2, "OK": 5}}}, "gRPC message: 2 times INTERNAL"),
        ({"came": {"HTTP body": {"500": 1}}}, "HTTP body: 1 times 500"),
        ({"came": {"HTTP body": {"no answer": 3}}}, "HTTP body: 3 times no answer"),
        ({"processes": [{**GOOD["processes"][0], "is_flat": False}]}, "a 1 grows"),
    ],
)
def test_what_the_wires_left_behind_is_a_problem(change: dict[str, Any], said: str) -> None:
    [problem] = problems({**deepcopy(GOOD), **change})
    assert said in problem


def test_answers_are_told_in_a_word() -> None:
    stream, told = b"".join(message(joined(frame)) for frame in FRAMES[1:]), hostile._frames_in
    words = "OverloadedError, WrongPlacementError, rows"
    assert told(stream, is_checked=False) == words
    assert told(stream + message(b"")[:16], is_checked=False) == f"{words}, too long"
    assert told(stream[:20], is_checked=False) == told(b"", is_checked=False) == "nothing"
    for said, word in (
        (b"HTTP/1.1 413 Too Large\r\n\r\n", "413"),
        (b"\x00", "bytes"),
        (b"", "nothing"),
    ):
        assert hostile._status_line(said) == word


def test_what_a_port_says_is_read_until_it_closes() -> None:
    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            assert sock.recv(100) == b"hello"
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        served = threading.Thread(target=serve, args=(listener,), daemon=True)
        served.start()
        said = hostile.said(listener.getsockname(), b"hello")
        served.join(10)
    assert hostile._status_line(said) == "400"

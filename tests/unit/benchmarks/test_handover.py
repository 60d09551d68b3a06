"""Verdicts about calls during changes of the gateways."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import handover
from benchmarks.handover import GRPC_NEW, HTTP, MAX_LOST


def result(**failed: int) -> dict[str, Any]:
    kinds = {kind: {"answered": 20_000, "failures": {}} for kind in MAX_LOST}
    for kind, number in failed.items():
        kinds[{"http": HTTP, "grpc": GRPC_NEW}[kind]]["failures"] = {"reset": number}
    return {"calls": kinds}


@pytest.mark.parametrize(
    ("failed", "missed"),
    [({}, []), ({"http": 1}, [HTTP]), ({"grpc": 2}, []), ({"grpc": 3}, [GRPC_NEW])],
)
def test_no_call_may_fail_but_few_on_new_grpc_channels(
    failed: dict[str, int], missed: list[str]
) -> None:
    verdicts = handover.judge(result(**failed))
    assert [one.figure for one in verdicts if not one.is_kept] == missed


def test_a_kind_without_a_call_is_missed() -> None:
    empty = result()
    empty["calls"][HTTP]["answered"] = 0
    [missed] = [one for one in handover.judge(empty) if not one.is_kept]
    assert (missed.figure, missed.measured) == (HTTP, "0 of 0 failed")

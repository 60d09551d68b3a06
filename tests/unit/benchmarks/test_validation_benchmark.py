"""The benchmark of checking requests: each kind of request is one that the gateway accepts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import validation


def test_every_kind_of_request_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []

    def once(work: Callable[[], object]) -> float:
        checked.append(work())
        return 60.0 if len(checked) == 1 else 40.0

    monkeypatch.setattr(validation, "least_us", once)
    judged = validation.verdicts(
        validation.run(validation.MODEL_PATH), {"429": 121.0, "401": 100.0}
    )
    assert len(checked) == 4
    assert [one.is_kept for one in judged] == [False, True, True, True, False]


def test_refusals_of_both_kinds_are_answered() -> None:
    """Any other answer is an error."""
    refused = validation.refused_us(2)
    assert refused.keys() == {"429", "401"}
    assert min(refused.values()) > 0

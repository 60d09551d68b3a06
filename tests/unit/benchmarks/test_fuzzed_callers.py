"""The targets of callers' headers find a check that lets strangers or other sites in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.fuzzing import callers
from benchmarks.fuzzing.target import Target
from cluster.errors import UnauthenticatedError
from router.gateway.browsers import BrowserRules
from router.security.access import FIELD, Access
from router.security.keys import ANYBODY, Caller

TARGETS = pytest.mark.parametrize("make", [callers.http, callers.metadata])


def run_all(make: Callable[[], Target]) -> None:
    target = make()
    for seed in target.seeds:
        target.run(seed)


@TARGETS
def test_a_check_that_lets_everybody_in_is_found(
    make: Callable[[], Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def admit(*_: object) -> Caller:
        return ANYBODY

    monkeypatch.setattr(Access, "admit", admit)
    with pytest.raises(AssertionError, match="without a key"):
        run_all(make)


@TARGETS
def test_a_check_that_takes_any_of_several_keys_is_found(
    make: Callable[[], Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = Access.admit

    async def admit_last(self: Access, surface: str, given: list[str], role: object) -> Caller:
        return await admit(self, surface, given[-1:], role)  # type: ignore[arg-type]

    monkeypatch.setattr(Access, "admit", admit_last)
    with pytest.raises(AssertionError, match="without a key"):
        run_all(make)


@TARGETS
def test_a_check_that_lets_nobody_in_is_found(
    make: Callable[[], Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> Caller:
        raise UnauthenticatedError("no", FIELD)

    monkeypatch.setattr(Access, "admit", refuse)
    with pytest.raises(AssertionError, match="refused the right key"):
        run_all(make)


def test_a_rule_that_lets_other_sites_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrowserRules, "check", lambda *_: None)
    with pytest.raises(AssertionError, match="another site"):
        run_all(callers.http)

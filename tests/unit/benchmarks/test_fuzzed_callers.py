"""The targets of callers' headers find a check that lets strangers or other sites in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.fuzzing import callers
from benchmarks.fuzzing.target import Target
from cluster.errors import UnauthenticatedError
from router.gateway.http_io import BrowserRules
from router.security.access import FIELD, Access
from router.security.keys import ANYBODY, Caller


def run_all(make: Callable[[], Target]) -> None:
    target = make()
    for seed in target.seeds:
        target.run(seed)


def test_a_rule_that_lets_other_sites_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrowserRules, "check", lambda *_: None)
    with pytest.raises(AssertionError, match="another site"):
        run_all(callers.http)


async def _admit(*_: object) -> Caller:
    return ANYBODY


async def _admit_by_the_last_key(
    self: Access, surface: str, given: list[str], role: object, real: Any = Access.admit
) -> Caller:
    return await real(self, surface, given[-1:], role)


async def _refuse(*_: object) -> Caller:
    raise UnauthenticatedError("no", FIELD)


@pytest.mark.parametrize("make", [callers.http, callers.metadata])
@pytest.mark.parametrize(
    ("admit", "message"),
    [
        (_admit, "without a key"),
        (_admit_by_the_last_key, "without a key"),
        (_refuse, "refused the right key"),
    ],
)
def test_a_check_that_lets_everybody_any_of_several_keys_or_nobody_in_is_found(
    make: Callable[[], Target], admit: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Access, "admit", admit)
    with pytest.raises(AssertionError, match=message):
        run_all(make)

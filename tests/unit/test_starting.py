"""The garbage collector while large libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from router.starting import collector_paused


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_rests_and_is_as_it_was_again(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled() == was_enabled


def test_an_import_that_fails_does_not_leave_it_off() -> None:
    with pytest.raises(ImportError), collector_paused():
        raise ImportError("no such library")
    assert gc.isenabled()

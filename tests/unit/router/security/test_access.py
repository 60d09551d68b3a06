"""The check of callers: who is let in, what a refusal tells, and how long it takes."""

from __future__ import annotations

import asyncio
import functools
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, ForbiddenError, UnauthenticatedError
from router.config.listen import ListenConfig
from router.security import access as module
from router.security.access import Access
from router.security.config import SecurityConfig
from router.security.keyring import Keyring
from router.security.keys import ANYBODY, Caller, Role
from router.security.keys_file import add_key
from router.security.reach import check_listen, is_loopback


class Gate:
    """An access with a key for inference, which refuses without delay, and its counts."""

    def __init__(self, folder: Path, slow_s: float = 0.0) -> None:
        self.key = add_key(folder / "keys.yaml", "alice", [Role.INFERENCE])
        self.counts: Counter[tuple[str, str]] = Counter()
        self.access = Access(
            Keyring(folder / "keys.yaml"), lambda *labels: self.counts.update([labels]), slow_s
        )

    def admit(self, given: Sequence[str], role: Role | None = Role.INFERENCE) -> Caller:
        return asyncio.run(self.access.admit("http", given, role))


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_without_keys_everybody_may_do_everything() -> None:
    access = Access(None, lambda *labels: pytest.fail("counted"))
    for values in ([], ["Bearer x"], ["nonsense", "twice"]):
        assert asyncio.run(access.admit("grpc", values, Role.ADMIN)) is ANYBODY
    assert access.is_open


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {} ", " Bearer {}"])
def test_the_owner_of_a_key_is_let_in(gate: Gate, form: str) -> None:
    assert gate.admit([form.format(gate.key)]).name == "alice"
    assert gate.admit([form.format(gate.key)], None).name == "alice"
    assert not gate.counts


@pytest.mark.parametrize(
    "form",
    ["", "Bearer", "{}", "Basic {}", "Bearer x{}", "Bearer {}x", "Bearer {} x", "Bearer\t{}",
     "Bearer {}\x00", "Bearer " + "x" * 100_000, "Bearer ключ", "Bearer \udcff"],
)  # fmt: skip
def test_whatever_else_is_given_is_refused_without_being_shown(
    gate: Gate, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "expertmesh.security"):
        for _ in range(3):
            with pytest.raises(UnauthenticatedError, match="a key of this deployment is") as no:
                gate.admit([form.format(gate.key)])
            assert gate.key not in str(no.value)
    assert gate.counts == {("http", "unknown_key"): 3}
    [record] = caplog.records  # now and then, not each time
    assert gate.key not in record.getMessage()


@functools.cache
def shared_gate() -> Gate:
    with tempfile.TemporaryDirectory() as folder:
        return Gate(Path(folder))


@settings(max_examples=100)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=80),
            st.binary(max_size=80).map(lambda given: given.decode("latin-1")),
            st.text(max_size=9).map(lambda after: f"Bearer {after}"),
            st.sampled_from(["Bearer", "bearer em-", "Basic Zm9v", "Bearer a b", "\r\nBearer x"]),
        ),
        max_size=3,
    )
)
def test_no_header_whatever_lets_a_stranger_in(values: list[str]) -> None:
    assert refusal_of(values) == refusal_of(["Bearer another"] if values else [])


def refusal_of(values: list[str]) -> str:
    """The words for a stranger who sends these values; they must hold nothing of the values."""
    with pytest.raises(UnauthenticatedError) as refused:
        shared_gate().admit(values)
    return str(refused.value)


def test_nothing_and_two_values_are_refused(gate: Gate) -> None:
    with pytest.raises(UnauthenticatedError, match="no key was sent"):
        gate.admit([])
    with pytest.raises(UnauthenticatedError, match="this key is unknown"):
        gate.admit([f"Bearer {gate.key}", f"Bearer {gate.key}"])
    assert gate.counts == {("http", "no_key"): 1, ("http", "unknown_key"): 1}


def test_a_key_of_another_role_is_told_which_it_needs(gate: Gate) -> None:
    with pytest.raises(ForbiddenError, match="this key is for inference, needed is admin"):
        gate.admit([f"Bearer {gate.key}"], Role.ADMIN)
    assert gate.counts == {("http", "wrong_role"): 1}


async def test_strangers_wait_and_owners_do_not(tmp_path: Path) -> None:
    gate = Gate(tmp_path, slow_s=0.3)
    strangers = asyncio.gather(
        *(gate.access.admit("grpc", [], None) for _ in range(20)), return_exceptions=True
    )
    await asyncio.sleep(0)
    began_s = time.monotonic()
    await gate.access.admit("grpc", [f"Bearer {gate.key}"], Role.INFERENCE)
    assert not strangers.done()
    errors = await strangers
    assert time.monotonic() - began_s >= 0.25
    assert all(isinstance(error, UnauthenticatedError) for error in errors)


async def test_a_crowd_of_strangers_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SLOW", 2)
    gate = Gate(tmp_path, slow_s=60.0)
    waiting = [asyncio.create_task(gate.access.admit("http", [], None)) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        with pytest.raises(UnauthenticatedError):
            await gate.access.admit("http", [], None)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    third = asyncio.create_task(gate.access.admit("http", [], None))
    await asyncio.sleep(0.05)
    assert not third.done()  # the places are free again
    third.cancel()


@pytest.mark.parametrize("key", ["host", "admin_host"])
@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.1.2.3", "gateway.lan")),
    ],
)
def test_other_machines_need_a_key_or_an_open_word(key: str, host: str, is_here: bool) -> None:
    hosts = ListenConfig(**{key: host}).hosts()
    for security in (SecurityConfig(keys_file="keys.yaml"), SecurityConfig(open=True)):
        check_listen(hosts, security, "gateway.listen")
    assert is_loopback(host) == is_here
    reason = f"^gateway.listen.{key}: must be an address of this machine .* got '{host}'. Make a"
    with nullcontext() if is_here else pytest.raises(ConfigError, match=reason):
        check_listen(hosts, SecurityConfig(), "gateway.listen")

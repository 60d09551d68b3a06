"""Experts for which the host has no memory are refused, with the bytes that are missing."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cluster.errors import Code, NoRoomError
from cluster.memory import Memory
from cluster.spec import ExpertKey
from experts import host_room
from experts.host_room import HostMemoryGuard
from tests.unit.experts.local_actor import KEYS, local_actor

MIB = 1 << 20


def keys(count: int) -> list[ExpertKey]:
    return [ExpertKey("m", 0, i) for i in range(count)]


def test_a_load_that_does_not_fit_is_refused_before_its_first_expert() -> None:
    room = HostMemoryGuard(dict.fromkeys(keys(10), MIB), lambda: 9 * MIB)
    with pytest.raises(NoRoomError, match="lacks 1,048,576 bytes of the 10,485,760") as caught:
        room.take(keys(1)[0])
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):  # as Ray brings it
        assert (type(error), str(error)) == (NoRoomError, str(caught.value))
        assert (error.needed_bytes, error.free_bytes) == (10 * MIB, 9 * MIB)
        assert error.missing_bytes == MIB
        assert (error.code, error.field) == (Code.UNAVAILABLE, "args.experts")
    assert NoRoomError("c", 4, 9, "f").missing_bytes == 0
    HostMemoryGuard({}, lambda: 0).take(keys(1)[0])  # what is on a device needs none


def test_memory_that_others_take_meanwhile_is_noticed_at_the_next_look() -> None:
    free, size = [10 * MIB], host_room.LOOK_BYTES // 2
    looks = 0

    def free_bytes() -> int:
        nonlocal looks
        looks += 1
        return free[0]

    room = HostMemoryGuard(dict.fromkeys(keys(8), size), free_bytes)
    free[0] = 8 * size
    for key in keys(4):
        room.take(key)
    assert looks == 2
    free[0] = 4 * size - 1
    with pytest.raises(NoRoomError) as caught:
        room.take(keys(5)[4])
    assert caught.value.missing_bytes == 1


def test_an_actor_refuses_a_load_and_goes_on_with_what_it_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = local_actor(folder, keys=KEYS[:1])
    monkeypatch.setattr(host_room, "memory", lambda: Memory(1, 1))
    with pytest.raises(NoRoomError, match=r"the memory of .* lacks 1 bytes of the 2"):
        actor.load(1, actor._spec, KEYS)  # two experts of one byte, by its specification
    assert actor.describe().experts == tuple(KEYS[:1])
    monkeypatch.setattr(host_room, "memory", lambda: Memory(2, 2))
    assert actor.load(1, actor._spec, KEYS).experts == tuple(KEYS)

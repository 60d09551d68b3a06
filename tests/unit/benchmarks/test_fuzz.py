"""For a moment, what ``benchmarks.fuzz`` does for minutes; and that it can find a fault."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from benchmarks.fuzzing.mutate import MAX_BYTES, mutated
from benchmarks.fuzzing.run import FOUND, by_mutation
from benchmarks.fuzzing.target import Target
from benchmarks.fuzzing.targets import TARGETS

EXAMPLES = {"tokenizer": 9, "http": 50, "stranger": 20, "router": 20}
DEFAULT_EXAMPLES = 75


@pytest.fixture(scope="module", params=TARGETS)
def named(request: pytest.FixtureRequest) -> tuple[str, Target]:
    return request.param, TARGETS[request.param]()


def test_good_inputs_and_mutated_ones_are_taken_or_refused_as_promised(
    named: tuple[str, Target],
) -> None:
    name, target = named
    for seed in target.seeds:
        target.run(seed)

    @settings(max_examples=EXAMPLES.get(name, DEFAULT_EXAMPLES), database=None)
    @given(st.integers(0, 2**64))
    def any_mutation(number: int) -> None:
        target.run(mutated(random.Random(number), target.seeds))

    any_mutation()


def test_any_bytes_are_taken_or_refused_as_promised(named: tuple[str, Target]) -> None:
    name, target = named

    @settings(max_examples=EXAMPLES.get(name, DEFAULT_EXAMPLES) // 3, database=None)
    @given(st.binary(max_size=300))
    def any_bytes(data: bytes) -> None:
        target.run(data)

    any_bytes()


def test_mutations_differ_and_are_the_same_for_the_same_seed() -> None:
    seeds = [b'{"a": [1, {"b": "c"}], "d": null}', b"\x00" * 20]

    def some(seed: int) -> list[bytes]:
        source = random.Random(seed)
        return [mutated(source, seeds) for _ in range(300)]

    assert some(1) == some(1)
    assert len({*some(1), *some(2)}) > 500
    assert all(len(data) <= MAX_BYTES for data in some(1))


def test_a_fault_is_found_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fragile(data: bytes) -> None:
        assert b"\xff" not in data, "met a byte that it cannot take"

    monkeypatch.setitem(TARGETS, "frame", lambda: Target([b"abcdefgh"], fragile))
    assert by_mutation("frame", 20, 1, tmp_path) == FOUND
    [kept] = tmp_path.iterdir()
    assert b"\xff" in kept.read_bytes()
    assert "met a byte that it cannot take" in capsys.readouterr().err


def test_the_command_knows_every_target() -> None:
    assert set(fuzz.TARGETS) == TARGETS.keys()

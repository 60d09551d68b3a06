"""How actors' times are judged from their answers, by a clock that the test turns."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping

import pytest

from router.moe.answer_times import BATCH, FRESH_S, AnswerTimes, Costs
from router.moe.copy_choice import PROBE_S, PROBE_SHARE, CopyChoice
from router.moe.permute import LayoutCache

COSTS = Costs(0.0005, 0.001, 0.0002)
ACTORS = ("a", "b", "c", "d")
WITH_SLOW = dict.fromkeys(ACTORS, 1.0) | {"d": 5.0}
NUM_EXPERTS, TOKENS, TOP_K = 16, 48, 2


def seconds(
    experts: int, rows: int, times: float, noise: random.Random | None = None, costs: Costs = COSTS
) -> float:
    """Return how long a part takes on an actor that is ``times`` as slow."""
    part_s, expert_s, row_s = costs
    factor = 1.0 if noise is None else math.exp(noise.gauss(0.0, 0.3))
    return times * (part_s + experts * expert_s + rows * row_s) * factor


def noted(
    slowness: Mapping[str, float],
    count: int,
    seed: int,
    costs: Costs = COSTS,
    most: Mapping[str, int] | None = None,
) -> Iterator[AnswerTimes]:
    """Note ``count`` answers of each actor, for parts of all sizes up to ``most`` experts."""
    source, times = random.Random(seed), AnswerTimes()
    for number in range(count):
        for actor_id, factor in slowness.items():
            experts = source.randint(1, (most or {}).get(actor_id, 8))
            rows = experts * source.randint(1, 6)
            took_s = seconds(experts, rows, factor, source, costs)
            times.note((actor_id, 1), experts, rows, took_s, 0.01 * number)
            yield times


@pytest.mark.parametrize(
    "costs",
    [COSTS, Costs(0.005, 0.0001, 0.00001), Costs(0.0, 0.002, 0.0), Costs(0.0, 0.0, 0.001)],
    ids=["mixed", "by part", "by expert", "by row"],
)
def test_equal_actors_are_not_slow_whatever_the_sizes_of_their_parts(costs: Costs) -> None:
    for times in noted({"many": 1, "few": 1}, 400, 1, costs, {"many": 12, "few": 1}):
        assert times.judgement is None


@pytest.mark.parametrize("factor", [2.0, 5.0, 12.0])
def test_an_actors_slowness_and_the_costs_are_found(factor: float) -> None:
    *_, times = noted({"a": 1, "b": 1, "c": 1, "slow": factor}, 300, 2)
    judgement = times.judgement
    assert judgement is not None
    assert judgement.slowness == {"slow": pytest.approx(factor, rel=0.3)}
    assert judgement.part_s("slow", 3, 9) == pytest.approx(seconds(3, 9, factor), rel=0.3)
    assert judgement.part_s("a", 3, 9) == pytest.approx(seconds(3, 9, 1.0), rel=0.3)
    assert times.slowness(3.0)["slow", 1] == pytest.approx(factor, rel=0.3)
    assert times.slowness(3.0 + FRESH_S + 1) == {}


def test_a_slow_actor_that_gets_small_parts_alone_is_judged_by_their_size() -> None:
    most = {"a": 12, "b": 12, "slow": 1}
    *_, times = noted({"a": 1, "b": 1, "slow": 5}, 400, 3, most=most)
    assert times.judgement is not None
    assert times.judgement.slowness == {"slow": pytest.approx(5.0, rel=0.35)}


def test_differences_as_long_as_sending_and_reading_make_no_actor_slow() -> None:
    """The frame that is sent last is answered last."""
    times = AnswerTimes()
    for number in range(400):
        for place, actor_id in enumerate(ACTORS):
            times.note((actor_id, 1), 1, 2, 0.00004 + 0.00002 * place, 0.01 * number)
            assert times.judgement is None
    assert set(times.slowness(4.0).values()) == {1.0}


def test_one_long_pause_makes_no_actor_slow() -> None:
    *_, times = noted({"a": 1, "b": 1, "c": 1}, 100, 4)
    times.note(("a", 1), 1, 1, 3.0, 1.01)
    for number in range(BATCH):
        times.note(("b", 1), 1, 1, seconds(1, 1, 1.0), 1.02 + 0.01 * number)
    assert times.judgement is None


def test_a_successor_begins_without_its_predecessors_name() -> None:
    *_, times = noted({"a": 1, "b": 1, "slow": 5}, 100, 5)
    assert times.judgement is not None
    times.forget_others({"a": 1, "b": 1, "slow": 2})
    assert times.judgement is None
    assert times.slowness(1.0).keys() == {("a", 1), ("b", 1)}


class Simulation:
    """A router's layers over actors that take what the costs say, on a clock of its own."""

    def __init__(self, slowness: Mapping[str, float], tokens: int = TOKENS) -> None:
        self.slowness = dict(slowness)
        self.copies = CopyChoice(LayoutCache(""), lambda *_: True)
        self.holders = [tuple(slowness)] * NUM_EXPERTS
        self.now_s = 0.0
        self.asked: list[frozenset[str]] = []
        self.layers_s: list[float] = []
        self._tokens = tokens
        self._source = random.Random(6)

    def counts(self) -> list[int]:
        counts = [0] * NUM_EXPERTS
        for _ in range(self._tokens):
            for expert_id in self._source.sample(range(NUM_EXPERTS), TOP_K):
                counts[expert_id] += 1
        return counts

    def layer(self) -> None:
        counts = self.counts()
        chosen = self.copies.choose(self.holders, counts, (), self.now_s)
        parts: dict[str, list[int]] = {}
        for actor_id, count in zip(chosen, counts, strict=True):
            if count:
                assert actor_id is not None
                parts.setdefault(actor_id, []).append(count)
        times_s = {
            a: seconds(len(own), sum(own), self.slowness[a], self._source)
            for a, own in parts.items()
        }
        self.now_s += max(times_s.values())
        self.layers_s.append(max(times_s.values()))
        self.asked.append(frozenset(parts))
        for actor_id, own in parts.items():
            actor, took_s = (actor_id, 1), times_s[actor_id]
            self.copies.times.note(actor, len(own), sum(own), took_s, self.now_s)

    def rate(self, layers: int = 600, first: int = 60) -> float:
        """Return the layers a second, after the first ones."""
        for _ in range(first):
            self.layer()
        began_s = self.now_s
        for _ in range(layers):
            self.layer()
        return layers / (self.now_s - began_s)


@pytest.mark.parametrize("tokens", [1, 4, TOKENS, 256])
def test_a_slow_copy_among_four_costs_less_than_it_adds(tokens: int) -> None:
    alone = Simulation(dict.fromkeys(ACTORS[:3], 1.0), tokens).rate()
    with_slow = Simulation(WITH_SLOW, tokens).rate()
    own_share = 1 / 5 / 3
    assert with_slow >= 0.85 * alone * (1 + own_share)


def test_equal_copies_are_chosen_as_if_nothing_were_measured() -> None:
    simulation = Simulation(dict.fromkeys(ACTORS, 1.0))
    plain = CopyChoice(LayoutCache(""), lambda *_: True)
    for _ in range(300):
        counts = simulation.counts()
        expected = plain.choose(simulation.holders, counts, (), 0.0)
        assert simulation.copies.choose(simulation.holders, counts, (), 0.0) == expected
        for actor_id in ACTORS:
            took_s = seconds(4, 24, 1.0, simulation._source)
            simulation.copies.times.note((actor_id, 1), 4, 24, took_s, 0.0)


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_copy_that_is_fast_again_is_asked_as_before_within_seconds(tokens: int) -> None:
    simulation = Simulation(WITH_SLOW, tokens)
    simulation.rate(500)
    judgement = simulation.copies.times.judgement
    assert judgement is not None
    assert judgement.slowness["d"] > 3
    simulation.slowness["d"] = 1.0
    until_s = simulation.now_s + 8 * PROBE_S
    while simulation.copies.times.judgement is not None:
        assert simulation.now_s < until_s
        simulation.layer()
    simulation.asked.clear()
    simulation.rate(500, 0)
    share = sum("d" in asked for asked in simulation.asked) / len(simulation.asked)
    others = sum("a" in asked for asked in simulation.asked) / len(simulation.asked)
    assert share == pytest.approx(others, rel=0.1)


def test_probes_of_a_slow_copy_cost_a_bounded_share_of_time() -> None:
    simulation = Simulation(dict.fromkeys(ACTORS, 1.0) | {"d": 100.0}, 1)
    simulation.rate(5000, 200)
    layers = list(zip(simulation.asked, simulation.layers_s, strict=True))[200:]
    probes_s = [took_s for asked, took_s in layers if "d" in asked]
    assert len(probes_s) >= 2
    assert sum(probes_s) / sum(took_s for _, took_s in layers) <= 2 * PROBE_SHARE * 100 / 16


def test_the_only_copy_is_asked_however_slow_and_its_actor_for_little_else() -> None:
    simulation = Simulation(WITH_SLOW)
    simulation.holders = [("d",), *[ACTORS] * (NUM_EXPERTS - 1)]
    simulation.rate(300)
    choose, counts = simulation.copies.choose, [6] * NUM_EXPERTS
    chosen = choose(simulation.holders, counts, (), simulation.now_s)
    assert chosen[0] == "d"
    assert chosen.count("d") == 1
    avoided = choose(simulation.holders, counts, {"d"}, simulation.now_s + 60)
    assert avoided.count("d") == 1  # no probe of an actor that failed

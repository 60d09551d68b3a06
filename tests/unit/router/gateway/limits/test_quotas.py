"""The quotas of keys on a fake clock: one gateway, several that share, and one that hears nothing.

What is let in is compared with the definition: over any time, what a whole bucket has and what
comes back meanwhile.
"""

from __future__ import annotations

import random

import pytest
from starlette.datastructures import Headers

from cluster.errors import OverloadedError, TooLargeError
from router.gateway.limits.charges import SILENCE_S, Charge, Charges
from router.gateway.limits.quotas import RATE_HEADERS, Bucket, duration_text
from router.gateway.metrics import Metrics
from router.security.keys import ANYBODY, Caller, Role
from router.security.limits import KeyLimits

INFERENCE = frozenset({Role.INFERENCE})


def caller(name: str = "alice", **limits: float) -> Caller:
    return Caller(name, INFERENCE, KeyLimits.model_validate(limits))


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Fleet:
    """Gateways that report to each other whenever :meth:`report` is called."""

    def __init__(self, num_gateways: int = 1) -> None:
        self.clock = Clock()
        self.metrics = [Metrics() for _ in range(num_gateways)]
        self.gateways = [Charges(metrics, self.clock) for metrics in self.metrics]

    def report(self) -> None:
        uses = [gateway.uses() for gateway in self.gateways]
        for index, gateway in enumerate(self.gateways):
            gateway.hear({str(i): use for i, use in enumerate(uses) if i != index})

    def charge(self, who: Caller, num_tokens: int = 1, gateway: int = 0) -> Charge:
        self.gateways[gateway].begin(who)
        return self.gateways[gateway].charge(who, num_tokens)

    def is_let_in(self, who: Caller, num_tokens: int = 1, gateway: int = 0) -> bool:
        """Charge for a call that uses all of its tokens, and has ended."""
        try:
            with self.charge(who, num_tokens, gateway) as charge:
                charge.use("generated", num_tokens)
        except OverloadedError:
            return False
        return True

    def let_in(self, who: Caller, seconds: float, tries_per_s: int, num_tokens: int) -> int:
        """Try at all gateways in turn for some time, with a report a second; returns the calls."""
        number = 0
        for step in range(int(seconds * tries_per_s)):
            number += self.is_let_in(who, num_tokens, step % len(self.gateways))
            self.clock.now_s += 1 / tries_per_s
            if step % tries_per_s == tries_per_s - 1:
                self.report()
        return number


def counted(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(labels.values()): value
        for group in metrics.samples().families.values()
        for sample, labels, value in group
        if sample == name
    }


def test_a_bucket_fills_steadily_and_may_owe() -> None:
    bucket = Bucket(2.0, 10.0, 0.0)
    bucket.take(13, 0.0)
    assert (bucket.level(0.0), bucket.level(1.0)) == (-3.0, -1.0)
    assert (bucket.wait_s(5, 1.0), bucket.level(100.0)) == (3.0, 10.0)
    bucket.take(-5, 100.0)
    assert bucket.level(100.0) == 10.0
    assert bucket.level(50.0) == 10.0  # a clock that goes back takes nothing


def test_requests_a_second_let_a_second_s_worth_in_at_once() -> None:
    fleet, alice = Fleet(), caller(requests_per_s=4)
    assert [fleet.is_let_in(alice) for _ in range(5)] == [True] * 4 + [False]
    with pytest.raises(OverloadedError, match="too little is left of this key's requests_per_s, 4"):
        fleet.charge(alice)
    fleet.clock.now_s += 0.24
    assert not fleet.is_let_in(alice)
    fleet.clock.now_s += 0.02
    assert [fleet.is_let_in(alice) for _ in range(2)] == [True, False]
    bob = caller("bob", requests_per_s=0.25)
    assert [fleet.is_let_in(bob) for _ in range(2)] == [True, False]
    with pytest.raises(OverloadedError) as refused:
        fleet.charge(bob)
    assert refused.value.retry_after_s == pytest.approx(4.0)


@pytest.mark.parametrize("seed", range(5))
def test_whoever_comes_back_at_the_announced_time_is_let_in_and_not_before(seed: int) -> None:
    chance = random.Random(seed)
    fleet = Fleet()
    rates = {"requests_per_s": chance.uniform(0.1, 9), "tokens_per_min": chance.randint(100, 9000)}
    limit = chance.choice(sorted(rates))  # one alone: a call refused for its tokens was a request
    alice = caller(**{limit: rates[limit]})
    num_refused = 0
    for _ in range(300):
        num_tokens = chance.randint(1, 100)
        try:
            fleet.charge(alice, num_tokens)
        except OverloadedError as refused:
            num_refused += 1
            wait_s = refused.retry_after_s
            assert wait_s is not None
            fleet.clock.now_s += wait_s * 0.999
            assert wait_s < 1e-3 or not fleet.is_let_in(alice, num_tokens)
            fleet.clock.now_s += wait_s * 0.001
            fleet.charge(alice, num_tokens)
        fleet.clock.now_s += chance.expovariate(20)
    assert num_refused > 20


def test_what_is_not_used_comes_back_at_the_end() -> None:
    fleet, alice = Fleet(), caller(tokens_per_min=100)
    with fleet.charge(alice, 90) as charge:
        charge.use("prompt", 20)
        charge.use("generated", 10)
        assert not fleet.is_let_in(alice, 11)
    assert not fleet.is_let_in(alice, 71)
    assert fleet.is_let_in(alice, 70)


def test_tokens_under_way_are_bounded_until_calls_end() -> None:
    fleet, alice = Fleet(), caller(concurrent_tokens=100)
    first = fleet.charge(alice, 60)
    with (
        fleet.charge(alice, 40),
        pytest.raises(OverloadedError, match="concurrent_tokens, 100") as e,
    ):
        fleet.charge(alice, 1)
    assert e.value.retry_after_s == 1.0
    assert not fleet.is_let_in(alice, 41)
    first.use("generated", 60)
    for _ in range(2):  # a second end changes nothing
        with first:
            pass
    assert fleet.is_let_in(alice, 100)


@pytest.mark.parametrize("limit", ["tokens_per_min", "concurrent_tokens"])
def test_a_call_that_never_fits_is_too_large_and_takes_nothing(limit: str) -> None:
    fleet, alice = Fleet(), caller(**{limit: 5000})
    with pytest.raises(TooLargeError, match=rf"5,001 tokens; this key's {limit} is 5,000"):
        fleet.charge(alice, 5001)
    assert fleet.is_let_in(alice, 5000)
    assert counted(fleet.metrics[0], "expertmesh_key_refusals_total") == {("alice", limit): 1.0}


def test_a_request_whose_call_is_refused_is_one_and_takes_no_tokens() -> None:
    fleet, alice = Fleet(), caller(requests_per_s=4, tokens_per_min=100)
    assert fleet.is_let_in(alice, 99)
    assert not fleet.is_let_in(alice, 50)
    assert fleet.is_let_in(alice, 1)
    assert not fleet.is_let_in(alice, 50)
    with pytest.raises(OverloadedError, match="requests_per_s, 4"):
        fleet.charge(alice, 0)
    fleet.clock.now_s += 0.25  # the refused request has taken nothing
    assert fleet.is_let_in(alice, 0)


def test_names_are_counted_apart_and_nobody_is_not_counted() -> None:
    fleet, alice, bob = Fleet(), caller("alice", requests_per_s=1), caller("bob", requests_per_s=1)
    carol = Caller("carol", INFERENCE)
    for who in (alice, alice, bob, carol, carol, ANYBODY):
        fleet.is_let_in(who, 7)
    [metrics] = fleet.metrics
    assert counted(metrics, "expertmesh_key_requests_total") == {
        ("alice",): 1.0, ("bob",): 1.0, ("carol",): 2.0
    }  # fmt: skip
    assert counted(metrics, "expertmesh_key_tokens_total") == {
        ("alice", "generated"): 7.0, ("bob", "generated"): 7.0, ("carol", "generated"): 14.0
    }  # fmt: skip
    assert counted(metrics, "expertmesh_key_refusals_total") == {("alice", "requests_per_s"): 1.0}
    assert set(fleet.gateways[0].uses()) == {"alice", "bob"}


def test_changed_limits_count_at_once_for_what_is_under_way_too() -> None:
    fleet = Fleet()
    assert fleet.is_let_in(caller(tokens_per_min=100), 50)
    assert not fleet.is_let_in(caller(tokens_per_min=10), 6)  # half of it is left
    assert fleet.is_let_in(caller(tokens_per_min=10), 5)
    assert not fleet.is_let_in(caller(tokens_per_min=6000), 50)
    fleet.clock.now_s += 0.5
    assert fleet.is_let_in(caller(tokens_per_min=6000), 50)
    assert fleet.is_let_in(caller(), 10**9)


def test_headers_tell_what_is_left_and_when_all_of_it_is() -> None:
    fleet, alice = Fleet(), caller(requests_per_s=2, tokens_per_min=6000)
    [gateway] = fleet.gateways
    fleet.charge(alice, 750)
    assert Headers(raw=gateway.headers(alice)).items() == list(
        zip(RATE_HEADERS, ("2", "1", "500ms", "6000", "5250", "7.5s"), strict=True)
    )
    of_bob = gateway.headers(caller("bob", tokens_per_min=1))
    assert Headers(raw=of_bob).keys() == list(RATE_HEADERS[3:])
    assert gateway.headers(caller("carol", concurrent_tokens=9)) == []
    assert gateway.headers(ANYBODY) == gateway.headers(None) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.02, "20ms"), (0.9991, "1s"), (1.5, "1.5s"), (59.5, "59.5s"), (60, "1m0s"),
     (61.25, "1m1.25s"), (360, "6m0s"), (3600, "1h0m0s"), (7384.5, "2h3m4.5s")],
)  # fmt: skip
def test_a_time_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("num_gateways", [1, 2, 5])
def test_gateways_share_a_rate_but_for_one_report(num_gateways: int) -> None:
    fleet, alice = Fleet(num_gateways), caller(tokens_per_min=6000, requests_per_s=1000)
    fleet.report()  # all of them run
    seconds, num_tokens, tries_per_s = 300, 50, 20
    tokens = num_tokens * fleet.let_in(alice, seconds, tries_per_s, num_tokens)
    fair = 6000 + 100 * seconds
    assert fair - num_gateways * num_tokens <= tokens
    # A report period lets in what the tries of a second ask for, and only once.
    assert tokens <= fair + num_tokens * tries_per_s


def test_what_one_gateway_has_used_is_refused_by_the_others_after_a_report() -> None:
    fleet, alice = Fleet(3), caller(tokens_per_min=600, requests_per_s=5)
    fleet.report()
    assert fleet.is_let_in(alice, 599, gateway=0)
    fleet.report()
    for gateway in (0, 1, 2):
        assert not fleet.is_let_in(alice, 2, gateway)
    assert fleet.is_let_in(alice, 1, gateway=2)
    fleet.report()
    with pytest.raises(OverloadedError, match="requests_per_s, 5"):
        fleet.charge(alice, 0, gateway=1)


def test_what_is_under_way_at_a_gateway_or_comes_back_counts_at_the_others() -> None:
    fleet, alice = Fleet(2), caller(tokens_per_min=600, concurrent_tokens=600)
    fleet.report()
    with fleet.charge(alice, 600, gateway=0) as charge:
        charge.use("prompt", 100)
        fleet.report()
        with pytest.raises(OverloadedError, match="tokens_per_min"):
            fleet.charge(alice, 500, gateway=1)
    fleet.report()
    assert fleet.is_let_in(alice, 500, gateway=1)
    bob = caller("bob", concurrent_tokens=100)
    held = fleet.charge(bob, 70, gateway=0)
    fleet.report()
    assert not fleet.is_let_in(bob, 31, gateway=1)
    assert fleet.is_let_in(bob, 30, gateway=1)
    with held:
        pass
    fleet.report()
    assert fleet.is_let_in(bob, 100, gateway=1)


def test_a_gateway_that_starts_has_no_more_than_the_others() -> None:
    fleet, alice = Fleet(1), caller(tokens_per_min=600)
    assert fleet.is_let_in(alice, 590)
    fleet.metrics.append(Metrics())
    fleet.gateways.append(Charges(fleet.metrics[1], fleet.clock))
    fleet.report()
    assert not fleet.is_let_in(alice, 11, gateway=1)
    assert fleet.is_let_in(alice, 10, gateway=1)
    fleet.report()
    assert not fleet.is_let_in(alice, 1, gateway=0)


def test_gateways_that_hear_nothing_have_equal_shares_together() -> None:
    fleet, alice = Fleet(4), caller(tokens_per_min=6000, concurrent_tokens=400)
    fleet.report()
    bob = caller("bob", concurrent_tokens=400)
    for gateway in range(4):
        fleet.is_let_in(alice, 1, gateway)
        fleet.is_let_in(bob, 1, gateway)
    elsewhere = fleet.charge(bob, 350, gateway=3)
    fleet.report()
    assert not fleet.is_let_in(bob, 51, gateway=2)
    fleet.clock.now_s += SILENCE_S + 60.0
    began_s, tokens = fleet.clock.now_s, 0
    while fleet.clock.now_s < began_s + 60.0:
        tokens += sum(10 * fleet.is_let_in(alice, 10, gateway) for gateway in range(4))
        fleet.clock.now_s += 0.1
    assert 12_000 - 4 * 10 <= tokens <= 12_000
    held = fleet.charge(bob, 80, gateway=2)
    assert not fleet.is_let_in(bob, 21, gateway=2)
    with held, elsewhere:
        assert fleet.is_let_in(bob, 20, gateway=2)
    assert fleet.is_let_in(bob, 400, gateway=2)  # alone, it may have more than a share
    fleet.report()  # what was used in the silence is not taken off once more
    fleet.clock.now_s += 1.0
    fleet.report()
    levels = [gateway.uses()["alice"].tokens_left for gateway in fleet.gateways]
    assert all(0 <= level <= 200 for level in levels)


def test_a_call_larger_than_a_share_waits_for_all_of_it_and_owes_the_rest() -> None:
    fleet, alice = Fleet(2), caller(tokens_per_min=600)
    fleet.report()
    assert fleet.is_let_in(alice, 1)
    fleet.report()
    fleet.clock.now_s += 120.0
    assert fleet.is_let_in(alice, 500)
    with pytest.raises(OverloadedError) as refused:
        fleet.charge(alice, 1)
    assert refused.value.retry_after_s == pytest.approx((200 + 1) / 5)

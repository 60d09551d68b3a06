"""A slow copy among four, with expert actors that are reached by streams and take emulated time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.placement.placement import empty_placement
from cluster.spec import ActorReport, ActorSpec, Emulation, ModelExperts, ModelSource
from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector
from cluster.transport.stream.handshake import Network, StreamOffer
from experts import actor as actor_module
from experts.actor import ExpertActor
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of
from router.control.placement_view import PlacementView
from router.moe.dispatch import Dispatcher
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import wait_until

MODEL, LAYER = "m", 0
HIDDEN, NUM_EXPERTS, TOKENS, TOP_K = 64, 16, 48, 2
BATCH_S, ROW_S = 0.003, 0.0002
SLOW = 5
FIRST, TURNS = 30, 60
ATTEMPTS = 6
"""A machine that is busy with other programs gives no answer in one."""
LIMIT_S = 60.0
EXPERTS = ModelExperts(MODEL, (LAYER,), NUM_EXPERTS, 1)
KEYS = EXPERTS.expert_keys()
GOOD = ("a", "b", "c")


class Actor(ExpertActor):
    """The actor, but for its questions to Ray."""

    def _report(self) -> ActorReport:
        raise AssertionError("nobody asks")


class Router:
    """A router's dispatcher over some actors that all hold the experts of a layer."""

    def __init__(self, actors: dict[str, Actor]) -> None:
        self._actors = actors
        placement = empty_placement(1, [EXPERTS])
        for actor_id in actors:
            placement = placement.with_actor(actor_id, 1, KEYS)
        view = PlacementView()
        view.publish(placement)
        self.transport = StreamTransport(Connector(self._offer, None), None)
        self.dispatcher = Dispatcher(MODEL, view, self.transport, lambda a, g: None, 10.0)
        self._source = np.random.default_rng(1)
        self._rows = torch.zeros(TOKENS, HIDDEN)
        wait_until(lambda: all(self.transport.is_ready(a, 1) for a in actors), "streams", LIMIT_S)

    def _offer(
        self, actor_id: str, generation: int, network: Network, timeout_s: float
    ) -> StreamOffer:
        return self._actors[actor_id].offer_stream(network)

    def layer_s(self) -> float:
        """Have a layer of random choices computed; returns how long that took."""
        topk_ids = self._source.random((TOKENS, NUM_EXPERTS)).argsort(axis=1)[:, :TOP_K]
        began_s = time.monotonic()
        pending = self.dispatcher.send(
            LAYER, self._rows, np.ascontiguousarray(topk_ids), began_s + 60
        )
        assert pending is not None
        received = self.dispatcher.wait(pending)
        assert received is not None
        assert sum(len(rows.pairs) for rows in received) == TOKENS * TOP_K
        return time.monotonic() - began_s


def layers_per_s(times_s: Sequence[float]) -> float:
    """Return the rate of the quicker three quarters: other programs hold up some of the rest."""
    kept = sorted(times_s)[: 3 * len(times_s) // 4]
    return len(kept) / sum(kept)


@pytest.fixture
def actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Actor]]:
    """Three good actors and a slow one."""
    monkeypatch.setattr(actor_module, "end_when_orphaned", lambda lease, app: None)
    save_mixtral(tmp_path)
    source = ModelSource(str(tmp_path), "float32", EXPERTS, identity_of(open_checkpoint(tmp_path)))
    actors: dict[str, Actor] = {}
    for actor_id in (*GOOD, "slow"):
        times = SLOW if actor_id == "slow" else 1
        emulation = Emulation(times * BATCH_S, times * ROW_S)
        spec = ActorSpec("app", (source,), 0.1, 0, 1, 100_000, emulation=emulation)
        actors[actor_id] = Actor(spec, actor_id, 1, 1)
        actors[actor_id]._load(1, KEYS)
    yield actors
    for actor in actors.values():
        actor._streams.close()


def test_a_slow_copy_among_four_adds_its_share(actors: dict[str, Actor]) -> None:
    three, four = Router({a: actors[a] for a in GOOD}), Router(actors)
    try:
        for _ in range(FIRST):
            four.layer_s()
        own_share = 1 / SLOW / len(GOOD)
        rates = []
        for _ in range(ATTEMPTS):
            # In turns, so that both see the same machine.
            turns = [(three.layer_s(), four.layer_s()) for _ in range(TURNS)]
            alone, together = map(layers_per_s, zip(*turns, strict=True))
            rates.append((alone, together))
            measured = four.dispatcher.times.slowness(time.monotonic())
            slow = measured.get(("slow", 1), 0.0)
            others = [measured.get((actor_id, 1), slow) for actor_id in GOOD]
            is_measured = slow == pytest.approx(SLOW, rel=0.5) and max(others) < slow / 2
            if is_measured and together >= 0.85 * alone * (1 + own_share):
                break
        else:
            raise AssertionError(f"layers a second, of three and of four: {rates}; {measured}")
    finally:
        three.transport.close()
        four.transport.close()

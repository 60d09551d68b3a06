"""The scenarios that have ever broken a law, each with its story.

A scenario is kept as data in ``past/``, since a seed draws another one after a change of what is
drawn. ``python -m benchmarks.world --replay tests/world/past/NAME.json`` shows one.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.world.weather import Scenario

FOLDER = Path(__file__).parent / "past"
STORIES = {
    "seed-15": "A quota said over gRPC when to come back, rounded to the nearest millisecond; who "
    "came back then was a part of a millisecond early, and was refused again.",
    "seed-86": "At a redeploy with fewer actors a node's memory is full, and its actors are ended "
    "with all experts that they serve, since they cannot load the rest of their new share. Then "
    "an actor waited for its own relief for ever.",
    "seed-99": "A device yields NaN just after the actor's look at its answers; routers ask its "
    "twins from then on, so nobody tests it, and it stays.",
    "seed-1198": "The network is cut, and a router looks up an actor; Ray's head did not answer, "
    "and the request ended as if the router had a bug.",
    "seed-1400": "A broken actor is to be replaced while its controller is cut off from the "
    "ledger; its keeper ended with an error that nobody saw.",
    "seed-1693": "Other weights are deployed, and nobody asks for two seconds; then a new gateway "
    "called the router of the earlier model over the link that it still had.",
    "seed-1982": "Three controllers in a second. The newest is cut off, and an earlier one moves "
    "experts meanwhile; the newest learned so late, and its map had one copy for a moment.",
    "seed-2127": "A controller is cut off from all actors, and a router waits in vain for one lost "
    "answer; the healthy actor, heard a second ago, was replaced.",
    "seed-2127-forms": "The same, and no router hears the actor either: it is as good as dead, and "
    "the law was too strict.",
    "seed-2497": "Two of three nodes are drained and go. Two actors wait for a place, and nobody "
    "held their experts, though the others had room.",
    "seed-2498": "A controller and the routers are cut off; when the network is back, a router's "
    "word of seconds ago arrives, and healthy actors were replaced by it.",
    "seed-3232": "Calls that Ray had lost, and actors whose devices failed, counted as deaths "
    "under a request that was computed alone; it was ended as the one at fault.",
    "seed-3417": "A rebalancing takes the expert away that a broken actor tests; the test ended, "
    "and the actor stayed, avoided by all routers.",
    "seed-4056": "Three copies of one frame come damaged; its request was ended, as if the router "
    "had made a wrong one.",
    "seed-4292": "A router's placement is old, and one of an expert's holders has no connection; "
    "the other, which refused, was asked again ten thousand times a second.",
    "seed-5168": "A network comes back: most actors answer late, and with them a router's old word "
    "that it waits in vain for the others, which another router hears; they were replaced.",
    "seed-5176": "Other weights are deployed while a gateway hangs; it went on calling a router of "
    "the earlier model, to which Serve sent nothing any more, over the link that it still had.",
    "seed-5774": "One copy of an expert yields NaN and the other cannot be reached; the router "
    "asked that one again and again without a pause.",
    "seed-6986": "Three controllers in a second; an earlier one took experts away that an actor "
    "had just reported to the newer one, and the map had them nowhere.",
    "seed-9259": "An actor is to leave the fleet while the ledger cannot be written; nothing was "
    "rebalanced or scaled any more.",
    "seed-10233": "A gateway begins while it is cut off from Ray's head, which it asked for its "
    "nodes first; it did not start, and the earlier one stayed.",
}
"""The story of each file of ``past/``, by its name without ``.json``."""


def scenario(name: str) -> Scenario:
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Scenario.from_json(data)

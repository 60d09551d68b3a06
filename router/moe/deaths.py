"""Counts expert actors that die with a chunk's rows in one layer without progress in between.

A frame that kills its actor's process would be sent to the next copy, and to each successor. So a
layer whose rows have seen two rounds of deaths gives up the step. Its chunks are then computed
alone, and a chunk that sees two further rounds is at fault (:mod:`router.engine.isolation`). Two,
because another router's chunk may kill the same actor while this one is computed: routers start
their trials at random times, so two of them hardly ever meet twice.

Actors that die in one round count once: a machine that is lost takes several with it. A generation
counts once, however often a frame is sent to it. The next layer counts anew.

Dimension letters: S tokens of the step, K experts per token, W chunks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.errors import PoisonedRequestError
from router.moe.permute import Part

MAX_DEATHS = 2
"""Rounds of deaths in one layer until the chunks that saw them are computed alone."""

ALONE_DEATHS = 2
"""Further rounds for a chunk computed alone until it is at fault."""

Actor = tuple[str, int]
"""An actor and its generation."""


class ActorsDiedError(Exception):
    """Chunks of the step have seen :data:`MAX_DEATHS` rounds of deaths, or another one alone."""


class Deaths(NamedTuple):
    """The rounds in which actors died with rows of one chunk in one layer, and these actors."""

    layer_id: int
    times: int
    actors: frozenset[Actor]

    @property
    def is_suspect(self) -> bool:
        """Whether the chunk is to be computed alone."""
        return self.times >= MAX_DEATHS

    @property
    def is_guilty(self) -> bool:
        """Whether actors died repeatedly with only this chunk's rows."""
        return self.times >= MAX_DEATHS + ALONE_DEATHS


def died_at(deaths: Deaths) -> PoisonedRequestError:
    """Return the error of a request at which actors died, finally while it was computed alone."""
    return PoisonedRequestError(
        f"expert actors died {deaths.times} times at this request, {ALONE_DEATHS} of them while "
        "it was computed alone"
    )


class StepDeaths:
    """The deaths of one step, by chunk; ``of_chunks`` [W] begins with those of earlier steps."""

    def __init__(self, sizes: Sequence[int], of_chunks: Iterable[Deaths | None]) -> None:
        """``sizes`` [W] are the chunks' numbers of tokens, in the order of the step's tokens."""
        self._sizes = sizes
        self.of_chunks = list(of_chunks)

    def note(self, layer_id: int, actors_of: dict[int, set[Actor]]) -> None:
        """Count one round, by the token of the step; raises :class:`ActorsDiedError`."""
        owners = np.repeat(np.arange(len(self._sizes)), self._sizes)  # [S]
        of_chunks: defaultdict[int, set[Actor]] = defaultdict(set)
        for token, actors in actors_of.items():
            of_chunks[int(owners[token])] |= actors
        has_suspect = False
        for index, actors in of_chunks.items():
            before = self.of_chunks[index]
            if before is None or before.layer_id != layer_id:
                before = Deaths(layer_id, 0, frozenset())
            if actors - before.actors:
                after = Deaths(layer_id, before.times + 1, before.actors | actors)
                self.of_chunks[index] = after
                has_suspect |= after.is_suspect
        if has_suspect:
            raise ActorsDiedError


@dataclass(frozen=True, slots=True)
class LayerDeaths:
    """The record of the rows of one layer; pair t * K + r is of the step's token ``tokens[t]``."""

    step: StepDeaths
    layer_id: int
    tokens: np.ndarray
    k: int

    def note(self, parts: Iterable[Part]) -> None:
        """Count a round in which the actors of ``parts`` died.

        Raises :class:`ActorsDiedError` where that makes a suspect of a chunk, or convicts one.
        """
        actors_of: defaultdict[int, set[Actor]] = defaultdict(set)
        for part in parts:
            for token in np.unique(self.tokens[part.pairs // self.k]).tolist():
                actors_of[token].add((part.actor_id, part.generation))
        self.step.note(self.layer_id, actors_of)

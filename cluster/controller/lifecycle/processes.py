"""Creates and ends the processes of expert actors: where, and only under the own epoch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from cluster.controller.health.deaths import Death, Deaths, delay_s
from cluster.controller.records.pool import ExpertPool, kind_of
from cluster.controller.records.state import LEDGER_TIMEOUT_S, ClusterState
from cluster.errors import StaleEpochError
from cluster.placement.successor import node_for_successor

START_NOTICE_S = 10.0
"""How long a successor may take to start beside its predecessor."""

logger = logging.getLogger("expertmesh.controller")


class ActorProcesses:
    """The processes of one application's actors."""

    def __init__(self, state: ClusterState, expert_pool: ExpertPool, deaths: Deaths) -> None:
        """``deaths`` knows the nodes on which actors have ended badly."""
        self._state = state
        self._expert_pool = expert_pool
        self._deaths = deaths
        self._pinned: set[str] = set()

    def is_pinned(self, actor_id: str) -> bool:
        """Return whether an actor's last generation was to start on a certain node."""
        return actor_id in self._pinned

    async def create(self, actor_id: str, node: str | None = None) -> ActorHandle:
        """Ask Ray for the next generation of an actor, without a wait for its start.

        It is to start on ``node`` if given, else on one that Ray chooses. Raises
        :class:`StaleEpochError` if a newer controller runs.
        """
        generation = await self._state.next_generation(actor_id)
        await self._last_words(actor_id)  # an earlier deployment's would be taken for its own
        self._pinned.discard(actor_id)
        if node is not None:
            self._pinned.add(actor_id)
        spec, epoch = self._state.fleet.specs[actor_id], self._state.placement.epoch
        return self._expert_pool.create(spec, actor_id, generation, epoch, node)

    async def create_beside(self, actor_id: str) -> ActorHandle | None:
        """Create an actor's successor on a free device of its node, and wait until it is there.

        Returns ``None`` if another node is better, or there is no free device, or Ray does not
        answer.
        """
        own, _ = self._deaths.place_of(actor_id)
        spec = self._state.fleet.specs[actor_id]
        try:
            candidates = await asyncio.to_thread(self._expert_pool.nodes_for, spec)
            if set(candidates) != {own}:
                return None
            successor = await self.create(actor_id, own)
        except StaleEpochError:
            return None  # the next look at the ledger says it too
        except Exception as error:  # Ray's control store is away
            logger.warning("%s: cannot start a successor beside it (%s)", actor_id, kind_of(error))
            return None
        try:
            await self._expert_pool.describe(successor, START_NOTICE_S)
        except (RayActorError, RayTaskError, TimeoutError) as error:
            logger.warning("%s: successor did not start beside it (%s)", actor_id, kind_of(error))
            self._expert_pool.kill(successor)
            return None
        except BaseException:
            self._expert_pool.kill(successor)
            raise
        return successor

    async def create_away(self, actor_id: str) -> ActorHandle:
        """Create an actor, away from nodes on which actors have ended badly lately."""
        avoided = self._deaths.avoided_nodes(time.monotonic())
        state, spec = self._state, self._state.fleet.specs[actor_id]
        candidates = await asyncio.to_thread(self._expert_pool.nodes_for, spec) if avoided else ()
        node = node_for_successor(
            actor_id,
            candidates,
            avoided,
            state.shares,
            state.nodes,
            state.min_copies,
            self._deaths.is_place_bad(actor_id),
        )
        if node is not None and node != state.nodes.get(actor_id):
            logger.info("moving %s to node %s, away from bad nodes", actor_id, node[:10])
        return await self.create(actor_id, node)

    async def end(self, handle: ActorHandle) -> bool:
        """End an actor once the ledger says that no newer controller runs.

        Returns false if one does.
        """
        for attempt in itertools.count():
            try:
                await self._state.check_epoch()
                break
            except StaleEpochError:
                return False
            except Exception as error:  # Ray's control store is away
                logger.warning("the ledger cannot be read (%s); ending nothing", kind_of(error))
                await asyncio.sleep(delay_s(attempt + 1, came_up=False))
        self._expert_pool.kill(handle)
        return True

    async def said(self, actor_id: str) -> Death | None:
        """Return the death of an actor that ended its own process and said why, else ``None``."""
        words = await self._last_words(actor_id)
        if not words:
            return None
        logger.error("%s ended itself: %s", actor_id, words)
        return Death(words, is_of_place=True)

    async def _last_words(self, actor_id: str) -> str:
        """Take the exit reason of an actor's last generation; empty if it left none.

        Only a device makes an actor end itself, so nobody asks about those that have none.
        """
        spec = self._state.fleet.specs.get(actor_id)
        if spec is None or not spec.num_gpus:
            return ""
        generation = self._state.last_generation(actor_id)
        try:
            async with asyncio.timeout(LEDGER_TIMEOUT_S):
                return await asyncio.to_thread(self._expert_pool.last_words, actor_id, generation)
        except Exception as error:  # Ray's control store is away
            logger.warning("%s: its exit reason cannot be read (%s)", actor_id, kind_of(error))
            return ""

"""Shields requests from a neighbour's fault: bisects failed steps and runs suspects alone.

A step changes nothing before it samples, so a step that raises can be recomputed in parts. The
engine computes halves of its requests, then halves of the halves that raise, down to single
requests. A request fails only after it has raised in a step of its own. With one such request
among n, at most 2 log2(n) further steps find it. If a probe step of one dummy token also raises,
the router is at fault and its process exits: gateways send its requests to other routers.

A request is a suspect if it may have killed processes: routers, as its gateway reports
(:attr:`GenerationRequest.alone`), or expert actors (:mod:`router.moe.deaths`). A suspect is
computed in steps of its own, so that no other request dies with it or is blamed for it. Its steps
alternate with the others' steps. After actors have died, such a step starts after a random delay,
so that it rarely meets a step of another router whose request may kill the same actors.
"""

from __future__ import annotations

import logging
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

from cluster.device import end_process, has_broken, lacks_memory
from cluster.errors import (
    ExpertMeshError,
    ExpertUnavailableError,
    ModelReplacedError,
    OverloadedError,
    PoisonedRequestError,
)
from router.engine.sequence import ScheduledChunk, Sequence
from router.moe.deaths import ActorsDiedError, died_at

CONTROL_S = 2.0
"""How long a probe step waits for unavailable experts."""
CONTROL_TOKEN = 0
TRY_S = 1.0
"""The longest delay before a request at which actors have died is computed alone."""
PAUSE_S = 0.005
"""How long an engine pauses when none of its requests may be tried yet."""
_NO_MEMORY = "the router's device ran out of memory for a step of this request alone; lower it"

Step = Callable[[list[ScheduledChunk]], None]
Fail = Callable[[str, ExpertMeshError], None]
Announce = Callable[[str, bool], bool]
"""Tells a request's gateway that a step of only this request begins (true) or ended (false).

Returns whether the message has left this process.
"""

logger = logging.getLogger("expertmesh.engine")


class Isolation:
    """Computes an engine's steps; ends requests whose own steps fail."""

    def __init__(
        self,
        step: Step,
        probe: Step,
        fail: Fail,
        announce: Announce,
        is_on_device: bool,
    ) -> None:
        """``step`` computes chunks and emits their tokens.

        ``probe`` computes chunks without any effect. ``fail`` ends a request with an error. With
        ``is_on_device`` the process exits if its device has failed.
        """
        self._is_on_device = is_on_device
        self._step = step
        self._probe = probe
        self._fail = fail
        self._announce = announce
        self._was_alone = False

    def compute(self, due: list[ScheduledChunk]) -> None:
        """Compute one step of the ``due`` chunks: one suspect's, or those of all non-suspects.

        The two alternate. Each request at which the step raises ends with an error.
        """
        suspects = [chunk for chunk in due if chunk.sequence.is_suspect]
        others = [chunk for chunk in due if chunk not in suspects] if suspects else due
        ready = [chunk for chunk in suspects if _may_be_tried(chunk.sequence)]
        if others and (self._was_alone or not ready):
            self._was_alone = False
            self._compute(others)
            return
        if not ready:
            time.sleep(PAUSE_S)
            return
        self._was_alone = True
        request = ready[0].sequence.request
        chunks = [chunk for chunk in due if chunk.sequence.request is request]
        for chunk in chunks:
            chunk.sequence.try_at_s = None  # the next trial, if any, gets a new time
        if not request.alone:
            self._compute(chunks)
        elif not self._announce(request.request_id, True):
            message = "the router could not tell the gateway that this request runs alone; retry"
            self._fail(request.request_id, OverloadedError(message, "queue", 1.0))
        else:
            self._compute(chunks)
            self._announce(request.request_id, False)

    def _compute(self, chunks: list[ScheduledChunk]) -> None:
        error = self._attempt(chunks)
        if error is None:
            return
        num_requests = len(_request_ids(chunks))
        logger.error("a step of %d requests failed", num_requests, exc_info=error)
        let_go(error)
        if num_requests == 1 and isinstance(error, ExpertMeshError):
            self._judge(chunks[0].sequence, error)  # the error names its cause
        else:
            self._narrow(chunks)

    def _attempt(self, chunks: list[ScheduledChunk]) -> Exception | None:
        """Compute chunks; return a step's error if one of its requests may have caused it."""
        try:
            self._step(chunks)
        except ActorsDiedError:
            self._fail_culprit(chunks)
        except (ModelReplacedError, ExpertUnavailableError) as error:
            for request_id in _request_ids(chunks):
                self._fail(request_id, error)
        except Exception as error:
            if self._is_on_device and has_broken(error):
                # Gateways replay its streams at another router.
                logger.critical("the router exits: its device failed (%s)", error)
                end_process()
            return error
        return None

    def _fail_culprit(self, chunks: list[ScheduledChunk]) -> None:
        """End a request at which actors died even though it was computed alone."""
        for sequence in [chunk.sequence for chunk in chunks]:
            deaths = sequence.deaths
            if deaths is not None and deaths.is_guilty:
                logger.error(
                    "request %s: %d expert actors died computing it in layer %d",
                    sequence.request.request_id,
                    len(deaths.actors),
                    deaths.layer_id,
                )
                self._fail(sequence.request.request_id, died_at(deaths))

    def _narrow(self, chunks: list[ScheduledChunk]) -> None:
        """Compute a failed step's chunks in halves; end each request that fails by itself."""
        for half in _halves(chunks):
            # After an error past sampling, some sequences have already ended.
            part = [chunk for chunk in half if chunk.sequence.pages]
            error = self._attempt(part) if part else None
            if error is None:
                continue
            let_go(error)
            if len(_request_ids(part)) > 1:
                self._narrow(part)
            else:
                self._judge(part[0].sequence, error)

    def _judge(self, sequence: Sequence, error: Exception) -> None:
        """End a request that fails by itself, or the router if it cannot compute any step."""
        if lacks_memory(error):
            error = OverloadedError(_NO_MEMORY, "args.router.max_batch_tokens", 1.0)
        if not isinstance(error, ExpertMeshError):
            self._check_router(sequence)
            message = f"the router cannot compute this request ({type(error).__name__})"
            error = PoisonedRequestError(message)
        logger.error("request %s failed alone; ending it (%s)", sequence.request.request_id, error)
        self._fail(sequence.request.request_id, error)

    def _check_router(self, sequence: Sequence) -> None:
        """Exit the process if it cannot compute a dummy token in the sequence's place."""
        request = replace(
            sequence.request, deadline_s=time.monotonic() + CONTROL_S, on_expert_loss="drop"
        )
        slots = sequence.own_slots
        control = Sequence(request, 0, [CONTROL_TOKEN], pages=sequence.pages, slots=slots)
        try:
            self._probe([ScheduledChunk(control, 0, 1)])
        except (ExpertMeshError, ActorsDiedError) as error:
            logger.warning("probe step could not reach its experts (%r)", error)
        except Exception as error:
            # Gateways replay its streams at another router.
            logger.critical("the router exits: it cannot compute any step (%r)", error)
            end_process()


def _may_be_tried(sequence: Sequence) -> bool:
    """Return whether a suspect may be tried now; the first call draws its delay."""
    if sequence.deaths is None or not sequence.deaths.is_suspect:
        return True
    now_s = time.monotonic()
    if sequence.try_at_s is None:
        sequence.try_at_s = now_s + TRY_S * random.random()
    return now_s >= sequence.try_at_s


def _request_ids(chunks: list[ScheduledChunk]) -> dict[str, None]:
    """Return the ids of the chunks' requests, each once and in order."""
    return dict.fromkeys(chunk.sequence.request.request_id for chunk in chunks)


def _halves(chunks: list[ScheduledChunk]) -> list[list[ScheduledChunk]]:
    """Split the chunks into two parts, never within a request; one request gives one part."""
    request_ids = list(_request_ids(chunks))
    if len(request_ids) == 1:
        return [chunks]
    first = set(request_ids[: len(request_ids) // 2])
    return [
        [chunk for chunk in chunks if chunk.sequence.request.request_id in first],
        [chunk for chunk in chunks if chunk.sequence.request.request_id not in first],
    ]


def let_go(error: BaseException) -> None:
    """Clear the frames that raised an error: their tensors fill the device."""
    raised: BaseException | None = error
    while raised is not None:
        traceback.clear_frames(raised.__traceback__)
        raised = raised.__cause__ or raised.__context__

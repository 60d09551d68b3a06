"""Keeps the fault of one request from its neighbours: steps are divided, and suspects run alone.

A step changes nothing before it samples, so a step that raises can be computed again in parts.
Halves of its requests are computed, and halves of the halves that raise, until single requests
raise: a request fails after it has raised in a step of its own. With one such request among n, at
most 2 log2(n) further steps find it. Where a step of one token of nobody's raises too, the fault is
the router's, and its process ends: gateways send its requests to other routers.

A request is a suspect where it may have ended processes: routers, as its gateway says
(:attr:`GenerationRequest.alone`), or expert actors (:mod:`router.moe.deaths`). A suspect is
computed in steps of its own, so that no other request dies with it or is taken for it. Such steps
take turns with those of all others. Where actors have died, a step alone begins after a random
time, so that it hardly meets that of another router, at whose request the same actors may die.
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
from router.engine.sequence import Sequence, Work
from router.moe.deaths import ActorsDiedError, died_at

CONTROL_S = 2.0
"""How long a step of nobody's waits for experts that are away."""
CONTROL_TOKEN = 0
TRY_S = 1.0
"""The longest time until a request at which actors have died is computed alone."""
PAUSE_S = 0.005
"""How long an engine pauses that has only requests whose time has not come."""
_NO_MEMORY = "the router's device has no memory for a step of so many tokens"

Step = Callable[[list[Work]], None]
Fail = Callable[[str, ExpertMeshError], None]
Announce = Callable[[str, bool], bool]
"""Tells the gateway of a request that a step of it alone begins (true) or has ended (false).

Returns whether the message has left this process.
"""

logger = logging.getLogger("expertmesh.engine")


class Isolation:
    """Computes an engine's steps; ends requests whose own steps fail."""

    def __init__(
        self,
        step: Step,
        control: Step,
        fail: Fail,
        announce: Announce,
        is_on_device: bool,
    ) -> None:
        """``step`` computes works and emits their tokens.

        ``control`` computes works without any effect. ``fail`` ends a request with an error. With
        ``is_on_device`` the process ends where its device is found in error.
        """
        self._is_on_device = is_on_device
        self._step = step
        self._control = control
        self._fail = fail
        self._announce = announce
        self._was_alone = False

    def compute(self, due: list[Work]) -> None:
        """Compute one step of ``due`` works: of one suspect alone, or of all that are none.

        Both take turns. Each request at which the step raises is ended with an error.
        """
        suspects = [work for work in due if work.sequence.is_suspect]
        others = [work for work in due if work not in suspects] if suspects else due
        ready = [work for work in suspects if _may_be_tried(work.sequence)]
        if others and (self._was_alone or not ready):
            self._was_alone = False
            self._compute(others)
            return
        if not ready:
            time.sleep(PAUSE_S)
            return
        self._was_alone = True
        request = ready[0].sequence.request
        works = [work for work in due if work.sequence.request is request]
        for work in works:
            work.sequence.try_at_s = None  # the next trial, if any, has a time of its own
        if not request.alone:
            self._compute(works)
        elif not self._announce(request.request_id, True):
            message = "the gateway cannot be told that its request is computed alone"
            self._fail(request.request_id, OverloadedError(message, "queue", 1.0))
        else:
            self._compute(works)
            self._announce(request.request_id, False)

    def _compute(self, works: list[Work]) -> None:
        error = self._attempt(works)
        if error is None:
            return
        num_requests = len(_request_ids(works))
        logger.error("a step of %d requests raised", num_requests, exc_info=error)
        let_go(error)
        if num_requests == 1 and isinstance(error, ExpertMeshError):
            self._judge(works[0].sequence, error)  # the error names its cause
        else:
            self._narrow(works)

    def _attempt(self, works: list[Work]) -> Exception | None:
        """Compute works; returns the error of a step that some of its requests may have caused."""
        try:
            self._step(works)
        except ActorsDiedError:
            self._convict(works)
        except (ModelReplacedError, ExpertUnavailableError) as error:
            for request_id in _request_ids(works):
                self._fail(request_id, error)
        except Exception as error:
            if self._is_on_device and has_broken(error):
                # Gateways replay its streams at another router.
                logger.critical("the router ends: its device failed (%s)", error)
                end_process()
            return error
        return None

    def _convict(self, works: list[Work]) -> None:
        """End a request at which actors died though it was computed alone."""
        for sequence in [work.sequence for work in works]:
            deaths = sequence.deaths
            if deaths is not None and deaths.is_guilty:
                logger.error(
                    "request %s: %d expert actors ended at it in layer %d",
                    sequence.request.request_id,
                    len(deaths.actors),
                    deaths.layer_id,
                )
                self._fail(sequence.request.request_id, died_at(deaths))

    def _narrow(self, works: list[Work]) -> None:
        """Compute the halves of works whose step has raised; a request that raises alone ends."""
        for half in _halves(works):
            # An error after sampling leaves sequences that have ended.
            part = [work for work in half if work.sequence.pages]
            error = self._attempt(part) if part else None
            if error is None:
                continue
            let_go(error)
            if len(_request_ids(part)) > 1:
                self._narrow(part)
            else:
                self._judge(part[0].sequence, error)

    def _judge(self, sequence: Sequence, error: Exception) -> None:
        """End a request that raises alone, or the router where it cannot compute any step."""
        if lacks_memory(error):
            error = OverloadedError(_NO_MEMORY, "args.router.max_batch_tokens", 1.0)
        if not isinstance(error, ExpertMeshError):
            self._check_router(sequence)
            message = f"the router cannot compute this request ({type(error).__name__})"
            error = PoisonedRequestError(message)
        logger.error("request %s raised alone, and ends (%s)", sequence.request.request_id, error)
        self._fail(sequence.request.request_id, error)

    def _check_router(self, sequence: Sequence) -> None:
        """End the process where it cannot compute a token of nobody's, in the sequence's place."""
        request = replace(
            sequence.request, deadline_s=time.monotonic() + CONTROL_S, on_expert_loss="drop"
        )
        slots = sequence.own_slots
        control = Sequence(request, 0, [CONTROL_TOKEN], pages=sequence.pages, slots=slots)
        try:
            self._control([Work(control, 0, 1)])
        except (ExpertMeshError, ActorsDiedError) as error:
            logger.warning("a step of nobody's has no experts (%r)", error)
        except Exception as error:
            # Gateways replay its streams at another router.
            logger.critical("the router ends: it cannot compute any step (%r)", error)
            end_process()


def _may_be_tried(sequence: Sequence) -> bool:
    """Return whether the time of a suspect has come; begins to count it at the first call."""
    if sequence.deaths is None or not sequence.deaths.is_suspect:
        return True
    now_s = time.monotonic()
    if sequence.try_at_s is None:
        sequence.try_at_s = now_s + TRY_S * random.random()
    return now_s >= sequence.try_at_s


def _request_ids(works: list[Work]) -> dict[str, None]:
    """Return the ids of the works' requests, each once and in order."""
    return dict.fromkeys(work.sequence.request.request_id for work in works)


def _halves(works: list[Work]) -> list[list[Work]]:
    """Return the works in two parts, without dividing a request; those of one request whole."""
    request_ids = list(_request_ids(works))
    if len(request_ids) == 1:
        return [works]
    first = set(request_ids[: len(request_ids) // 2])
    return [
        [work for work in works if work.sequence.request.request_id in first],
        [work for work in works if work.sequence.request.request_id not in first],
    ]


def let_go(error: BaseException) -> None:
    """Forget the variables of the functions that raised an error: tensors that fill a device."""
    raised: BaseException | None = error
    while raised is not None:
        traceback.clear_frames(raised.__traceback__)
        raised = raised.__cause__ or raised.__context__

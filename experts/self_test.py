"""The self-test of an expert actor: tells a failing device from a frame that no device can compute.

A batch that raises, and rows that are not finite, may be caused by the device or by the frame: one
bad request must not cost a healthy actor. After either, the actor runs the same experts on rows of
its own: zeros, which a gated expert maps to finite numbers where its weights are finite. It
repeats the test until one succeeds. The report tells how many tests in a row have failed, and the
controller replaces the actor after a few (:mod:`cluster.controller.health.deaths`).

A thread of this module checks samples of rows after they are sent, so that no answer waits.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence

import numpy as np

from cluster.errors import OverloadedError, WrongPlacementError, first_line
from cluster.spec import ExpertKey
from cluster.wire.arrays import DTYPES, array_of
from cluster.wire.frames import DispatchFrame, ErrorFrame, RowsFrame

TEST_PERIOD_S = 0.25
"""Time between two tests while they fail."""
SAMPLE_PERIOD_S = 0.25
"""The time between two looks at answers, each at the latest one. Routers that get rows which are
not finite ask other copies from then on, so no later answer might tell."""
SAMPLE_ROWS = 16
"""The most rows of an answer that are looked at; a device that fails spoils all of them."""
MAX_CHARS = 200
"""The most characters of a failure in reports."""

ComputeAlone = Callable[[DispatchFrame], RowsFrame | ErrorFrame]

logger = logging.getLogger("expertmesh.actor")


class SelfTest:
    """The tests of one actor, and their result for its reports.

    ``failed_batches`` counts the batches that raised, ``failed_tests`` the tests that failed in a
    row, and ``failure`` says how the last of these failed.
    """

    def __init__(
        self,
        actor_id: str,
        compute_alone: ComputeAlone,
        is_sound: Callable[[DispatchFrame], bool],
        held: Callable[[], Collection[ExpertKey]],
    ) -> None:
        """Begin healthy; nothing is tested before :meth:`start`.

        ``compute_alone`` answers a frame while no other is computed. ``is_sound`` returns whether
        the experts of a frame map zeros to finite numbers by their checkpoint; it may take long,
        and raise where the checkpoint cannot be read. ``held`` returns the actor's experts.
        """
        self.failed_batches = 0
        self.failed_tests = 0
        self.failure = ""
        self._actor_id = actor_id
        self._compute_alone = compute_alone
        self._is_sound = is_sound
        self._held = held
        self._changed = threading.Condition()
        self._suspected: DispatchFrame | None = None
        self._sample: tuple[DispatchFrame, RowsFrame] | None = None
        self._is_idle = False

    def start(self) -> None:
        """Test on a daemon thread, which sleeps while nothing is to be tested."""
        threading.Thread(target=self._run, name="self-test", daemon=True).start()

    # What the computing thread calls.

    def note_failed(self, frames: Sequence[DispatchFrame]) -> None:
        """Take a batch that raised; its first frame's experts are tested."""
        with self._changed:
            self.failed_batches += 1
            if self._suspected is None and frames:
                self._suspected = _zeros_like(frames[0])
                self._changed.notify()

    def note_computed(
        self, frames: Sequence[DispatchFrame], answers: Sequence[RowsFrame | ErrorFrame]
    ) -> None:
        """Take a batch to look at, instead of any before it; its memory is kept until then."""
        for frame, answer in zip(frames, answers, strict=True):
            if isinstance(answer, RowsFrame):
                self._sample = frame, answer
                if self._is_idle:
                    with self._changed:
                        self._changed.notify()
                return

    # The thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_idle = True  # first: a sample that the next line does not see notifies
                while self._suspected is None and self._sample is None:
                    self._changed.wait()
                self._is_idle = False
            try:
                is_done = self.look()
            except Exception:  # the thread goes on: a later test may tell
                logger.exception("%s: a self-test returned no result", self._actor_id)
                is_done = False
            time.sleep(SAMPLE_PERIOD_S if is_done else TEST_PERIOD_S)

    def look(self) -> bool:
        """Look at the sample, and test what is suspected; returns whether nothing is left to test.

        Another call tests the same experts again where this one's test failed. Raises what
        ``is_sound`` raises.
        """
        with self._changed:
            sample, self._sample = self._sample, None
            suspected = self._suspected
        is_good = sample is None or (_is_whole(sample[1]) and _are_finite(sample[1]))
        if suspected is None and sample is not None and not is_good:
            suspected = _zeros_like(sample[0])
        with self._changed:
            self._suspected = suspected
        if suspected is None:
            return True
        is_done = self._test(suspected)
        if is_done:
            with self._changed:
                self._suspected = None
        return is_done

    def _test(self, frame: DispatchFrame) -> bool:
        """Compute rows of zeros; returns whether the experts need no further test."""
        try:
            answer = self._compute_alone(frame)
        except Exception as error:  # of any kind: the batch was the actor's own
            self._note(f"{type(error).__name__}: {first_line(error)}")
            return False
        if isinstance(answer, ErrorFrame):
            if isinstance(answer.error, OverloadedError):  # no memory for it now: says nothing
                return False
            if isinstance(answer.error, WrongPlacementError):  # unloaded meanwhile
                return self._test_others(frame)
        elif not _is_whole(answer):
            self._note("rows of the answer are missing")
            return False
        elif not _are_finite(answer) and self._is_sound(frame):
            self._note("finite weights and rows of zeros yield NaN or infinity")
            return False
        if self.failed_tests:
            logger.warning("%s: self-tests succeed again", self._actor_id)
        self.failed_tests, self.failure = 0, ""
        return True

    def _test_others(self, frame: DispatchFrame) -> bool:
        """Have an expert tested that the actor still holds; returns whether there is no need to.

        Without one of the model, an actor whose tests have failed waits for it.
        """
        held = sorted(key for key in self._held() if key.model == frame.model)
        if not held:
            return not self.failed_tests
        layer_id, expert_id = held[0].layer_id, held[0].expert_id
        with self._changed:
            self._suspected = _zeros_like(
                frame._replace(layer_id=layer_id, expert_ids=(expert_id,))
            )
        return False

    def _note(self, failure: str) -> None:
        if not self.failed_tests:
            logger.error("%s: a self-test failed: %s", self._actor_id, failure)
        self.failure = failure[:MAX_CHARS]
        self.failed_tests += 1


def _zeros_like(frame: DispatchFrame) -> DispatchFrame:
    """Return a frame of one row of zeros for each expert of a frame."""
    num_rows = len(frame.expert_ids)
    size = DTYPES[frame.dtype].itemsize * num_rows * int(np.prod(frame.row_shape, dtype=np.int64))
    return frame._replace(
        request_id=0,
        num_tokens_per_expert=(1,) * num_rows,
        num_rows=num_rows,
        rows=bytes(size),
        traceparent=None,
    )


def _is_whole(answer: RowsFrame) -> bool:
    """Return whether an answer has the bytes of its rows."""
    row_bytes = DTYPES[answer.dtype].itemsize * math.prod(answer.row_shape)
    return sum(map(len, answer.rows)) == answer.num_rows * row_bytes


def _are_finite(answer: RowsFrame) -> bool:
    num_rows = min(answer.num_rows, SAMPLE_ROWS)
    if not num_rows:
        return True
    row_bytes = sum(map(len, answer.rows)) // answer.num_rows
    # Pieces are whole rows of experts, so that the first one may have fewer rows than are wanted.
    first = memoryview(answer.rows[0])[: num_rows * row_bytes]
    rows = array_of(first, answer.dtype, len(first) // row_bytes, (-1,))
    return bool(np.isfinite(rows).all())

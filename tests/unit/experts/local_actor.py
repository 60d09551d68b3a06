"""An expert actor in the test's own process, and frames for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, SimpleNamespace
from unittest.mock import patch

import torch

from cluster.spec import ActorSpec, ExpertKey, ModelExperts, ModelSource
from cluster.wire.frames import RowsFrame
from experts import actor as actor_module
from experts.actor import ExpertActor
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of
from tests.unit.experts.frames import dispatch_bytes

HIDDEN = 64
LIMIT_S = 60.0
KEYS = [ExpertKey("m", 0, 0), ExpertKey("m", 0, 3), ExpertKey("m", 2, 3)]
_PLACE = SimpleNamespace(get_node_id=lambda: "node", get_accelerator_ids=lambda: {"GPU": ["0"]})
_NAMES = {**vars(actor_module), "ray": SimpleNamespace(get_runtime_context=lambda: _PLACE)}


class Actor(ExpertActor):
    """The actor, but for what it asks Ray about its place."""

    _report = FunctionType(ExpertActor._report.__code__, _NAMES)  # type: ignore[assignment]


_actors: list[Actor] = []


@contextmanager
def self_tests_ended() -> Iterator[None]:
    """End the self-tests of the actors that the block makes by :func:`local_actor`.

    Without the block's device they would fail, and be repeated for ever. A sample may stay: what it
    suspects later is computed by no device.
    """
    _actors.clear()
    yield
    healthy = RowsFrame(0, 0, (HIDDEN,), "float32", ())
    for actor in _actors:
        self_test = actor._queue.self_test
        self_test._compute_alone = lambda frame: healthy
        deadline_s = time.monotonic() + LIMIT_S
        while self_test._suspected is not None:
            assert time.monotonic() < deadline_s, self_test.failure
            threading.Event().wait(0.002)


def local_actor(
    folder: Path,
    max_queue_rows: int = 1000,
    num_gpus: float = 0.0,
    keys: Sequence[ExpertKey] = KEYS,
) -> Actor:
    """Return an actor of the model in ``folder`` that has loaded the experts of ``keys``."""
    identity = identity_of(open_checkpoint(folder))
    source = ModelSource(str(folder), "float32", ModelExperts("m", (0, 1, 2), 8, 1), identity)
    spec = ActorSpec("app", (source,), 0.1, num_gpus, 1, max_queue_rows)
    # Without a controller its lease would end this process.
    with patch.object(actor_module, "end_when_orphaned", lambda lease, app: None):
        actor = Actor(spec, "expert-0", 1, 1)
    _actors.append(actor)
    actor.load(1, spec, keys)
    return actor


def rows_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def frame_of(
    rows: torch.Tensor,
    request_id: int = 1,
    timeout_s: float = LIMIT_S,
    expert_id: int = 3,
    traceparent: str | None = None,
) -> bytes:
    """A frame that sends all rows to one expert of layer 0."""
    fields = {"request_id": request_id, "time_left_s": timeout_s, "traceparent": traceparent}
    return dispatch_bytes(rows, {expert_id: len(rows)}, **fields)

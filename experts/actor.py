"""The expert actor: one per device, with any subset of the experts.

The streams' thread brings the frames of all routers; a Ray call brings one frame on a thread of its
own (:mod:`experts.remote`). Each puts its frames into a bounded queue, and one thread at a time
computes: it takes all waiting frames, merges them (:mod:`experts.bank`) and answers them all. So a
lone call never changes threads, and many calls share an expert's product. The actor has threads
because a Ray call to an asyncio actor takes 0.3 ms longer. Calls are pure: a frame that is
computed twice gets the same answer, so a router may always repeat a call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import ray
import torch

from cluster.controller.lease import Lease, end_when_orphaned
from cluster.device import CPU, accelerator, free_bytes
from cluster.errors import (
    CheckpointError,
    DeadlineExceededError,
    ExpertMeshError,
    FrameError,
    InternalError,
    OverloadedError,
    StaleEpochError,
    UnavailableError,
)
from cluster.spec import EMULATED, ActorReport, ActorSpec, ExpertKey
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.transport.stream.server import StreamServer
from cluster.wire.frames import (
    Buffer,
    Buffers,
    DispatchFrame,
    ErrorFrame,
    RowsFrame,
    Shape,
    decode,
    encode,
)
from cluster.wire.tensors import TORCH_DTYPES
from experts.bank import Expert, ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.remote_files import open_model
from experts.checkpoint.remote_reader import RayNeighbours
from experts.checkpoint.stored import RemoteFiles
from experts.compute.emulated import EmulatedExpert
from experts.compute.ffn import ACTIVATIONS
from experts.tracing import open_spans

end_process = partial(os._exit, 1)
MAX_BATCH_ROWS = 1024
"""The most rows of several frames in one batch; a product of more gains nothing by sharing."""

logger = logging.getLogger("expertmesh.actor")


@dataclass(slots=True)
class _Waiting:
    """A frame in the queue."""

    frame: DispatchFrame
    since_s: float
    answer: Buffers = ()
    """Empty until the frame is computed."""


@dataclass(frozen=True, slots=True)
class _Refused:
    """A frame that is answered without the queue, by an error."""

    answer: Buffers


class ExpertActor:
    """Holds and computes the experts that its controller assigns to it."""

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        """Start without experts; :meth:`load` loads them."""
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._actor_id = actor_id
        self._generation = generation
        self._epoch = epoch
        self._sources = {source.experts.model: source for source in spec.models}
        found = accelerator() if spec.num_gpus > 0 else CPU
        self._device = found or CPU
        self._has_device = found is not None  # else :meth:`load` says so
        self._bank = ExpertBank()
        self._checkpoints: dict[str, Checkpoint | Mixture] = {}
        self._load_lock = threading.Lock()
        self._queue: list[_Waiting] = []
        self._queued_rows = 0
        self._computing = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._blocked = 0  # threads that wait for ``_changed``
        self._steps = 0
        # Only the computing thread writes these counters, so they need no lock.
        self._frames = 0
        self._busy_s = 0.0
        self._waited_s = 0.0
        self._spans = open_spans(actor_id, generation)
        tls = None if spec.tls is None else spec.tls.server_context()
        self._streams = StreamServer(
            self.compute_all, ray.util.get_node_ip_address(), tls, torch.inference_mode
        )
        self._lease = Lease(time.monotonic())
        end_when_orphaned(self._lease, spec.app)

    # Control calls, on threads of their own (:mod:`experts.remote`).

    def load(self, epoch: int, spec: ActorSpec, keys: Sequence[ExpertKey]) -> ActorReport:
        """Load the given experts beside the held experts; returns when all of them serve.

        ``spec`` is the actor's own from now on, with what may change of it.
        A checkpoint that is not on this node's disk comes from another node. Raises
        :class:`CheckpointError` when no node can read the checkpoint, and for bytes that differ
        from the served checkpoint; the experts loaded before that stay. Raises
        :class:`UnavailableError` when torch does not find the device that Ray has assigned. Raises
        :class:`StaleEpochError` at the next expert once a newer controller has given an order, so
        that its orders do not wait for the rest.
        """
        self._accept(epoch)
        if not self._has_device:
            raise UnavailableError(
                f"Ray gave this actor a GPU of {ray.util.get_node_ip_address()}, but torch "
                f"{torch.__version__} finds no accelerator there; install torch for it, or set "
                "num_gpus: 0",
                "args.experts.num_gpus",
            )
        with self._load_lock:
            self._check(epoch)
            self._take_over(spec)
            self._load(epoch, [ExpertKey(*key) for key in keys])
        return self._report()

    def _take_over(self, spec: ActorSpec) -> None:
        """Go by a specification that may have other models and limits."""
        before, self._spec = self._sources, spec
        self._sources = {source.experts.model: source for source in spec.models}
        # A checkpoint that has moved is opened anew; its old folder may go.
        self._checkpoints = {
            key: checkpoint
            for key, checkpoint in self._checkpoints.items()
            if self._sources.get(key) == before[key]
        }

    def unload(self, epoch: int, keys: Sequence[ExpertKey]) -> ActorReport:
        """Free the given experts and their memory after the current batch.

        The answer to a later frame for one of them is WrongPlacementError. Experts that the actor
        does not hold are ignored.
        """
        self._accept(epoch)
        with self._load_lock, self._lock:
            while self._computing:
                self._wait()
            for key in keys:
                self._bank.release(ExpertKey(*key))
            self._bank.forget_others(self._sources.keys())
        return self._report()

    def heartbeat(self, epoch: int) -> ActorReport:
        """Renew the lease and report; raises :class:`StaleEpochError` for an older epoch."""
        self._accept(epoch)
        return self._report()

    def describe(self) -> ActorReport:
        """Report without renewing the lease, for a controller that looks for actors to adopt."""
        return self._report()

    def offer_stream(self, network: Network) -> StreamOffer:
        """Return the offer of one stream to this actor; raises ``OSError`` if it cannot listen."""
        return self._streams.offer(network)

    def _accept(self, epoch: int) -> None:
        self._check(epoch)
        self._epoch = epoch
        self._lease.renew(time.monotonic())

    def _check(self, epoch: int) -> None:
        """Raise :class:`StaleEpochError` where a newer controller has given an order."""
        if epoch < self._epoch:
            raise StaleEpochError(f"is older than {self._epoch} (given: {epoch})", "epoch")

    def _load(self, epoch: int, keys: Sequence[ExpertKey]) -> None:
        """Load experts that are not held yet; under the lock of loads."""
        for key in keys:
            self._check(epoch)
            if key in self._bank:
                continue
            source = self._sources[key.model]
            if key.model not in self._checkpoints:
                self._checkpoints[key.model] = open_model(
                    source.path, source.identity, RayNeighbours()
                )
            checkpoint = self._checkpoints[key.model]
            dtype = TORCH_DTYPES[source.dtype]
            try:
                expert = self._load_expert(checkpoint, key, dtype)
            except CheckpointError:
                del self._checkpoints[key.model]  # the next load looks at the files anew
                raise
            self._bank.hold(key, expert)
        for remote in self._remotes():
            remote.release()

    def _load_expert(
        self, checkpoint: Checkpoint | Mixture, key: ExpertKey, dtype: torch.dtype
    ) -> Expert:
        if self._spec.emulation is not None:
            return EmulatedExpert(self._spec.emulation, *_shapes(checkpoint), dtype)
        if isinstance(checkpoint, Mixture):
            from experts.backends.load import load_mixture_expert  # imports scikit-learn

            return load_mixture_expert(checkpoint, key.expert_id)
        weights = load_expert(checkpoint, key.layer_id, key.expert_id, dtype, self._device)
        return GatedFfnExpert(weights, ACTIVATIONS[checkpoint.shape.activation])

    def _remotes(self) -> list[RemoteFiles]:
        return [c.remote for c in self._checkpoints.values() if c.remote is not None]

    def _report(self) -> ActorReport:
        remotes = self._remotes()
        return ActorReport(
            actor_id=self._actor_id,
            generation=self._generation,
            digest=self._spec.digest,
            epoch=self._epoch,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            device=str(self._device) if self._spec.emulation is None else EMULATED,
            experts=tuple(sorted(self._bank.experts)),
            weight_bytes=self._bank.num_bytes,
            tokens=self._bank.tokens,
            queued_rows=self._queued_rows,
            steps=self._steps,
            frames=self._frames,
            busy_s=self._busy_s,
            waited_s=self._waited_s,
            fetched_bytes=sum(remote.fetched_bytes for remote in remotes),
            fetched_s=sum(remote.fetched_s for remote in remotes),
            free_bytes=free_bytes(self._device),
        )

    # Data plane.

    def compute(self, data: Buffer) -> bytes:
        """Answer one frame of a Ray call; see :meth:`compute_all`."""
        return b"".join(next(self.compute_all([data])))

    def compute_all(self, data: Sequence[Buffer]) -> Iterator[Buffers]:
        """Answer each dispatch frame, in order, by a rows frame or an error frame; never raises.

        An answer comes as soon as its batch is computed, while others still wait. The answer to a
        frame that would put more than ``max_queue_rows`` rows into the queue is RESOURCE_EXHAUSTED;
        the router tries again.
        """
        read = [_read(buffer) for buffer in data]
        now_s = time.monotonic()
        with self._lock:
            items = [
                self._enqueue(frame, now_s) if isinstance(frame, DispatchFrame) else frame
                for frame in read
            ]
        for item in items:
            while not item.answer:
                self._compute_next(item)
            yield item.answer

    def _compute_next(self, item: _Waiting | _Refused) -> None:
        """Compute the queue's next batch, or wait for the thread that computes one."""
        with self._lock:
            # This wait is bounded: the computing thread answers every frame of its batch, also
            # after the frame's deadline.
            while self._computing and not item.answer:
                self._wait()
            if item.answer:
                return
            self._computing = True
            batch = self._next_batch()
        self._compute_and_answer(batch)

    def _next_batch(self) -> list[_Waiting]:
        """Take the frames that are computed together off the queue; under the lock."""
        count, num_rows = 0, 0
        for waiting in self._queue:
            num_rows += waiting.frame.num_rows
            if count and num_rows > MAX_BATCH_ROWS:
                break
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    def _wait(self) -> None:
        """Wait until the computing thread has finished its batch; under the lock."""
        self._blocked += 1
        try:
            self._changed.wait()
        finally:
            self._blocked -= 1

    def _enqueue(self, frame: DispatchFrame, now_s: float) -> _Waiting | _Refused:
        """Put a frame into the queue, or refuse it where the queue is full; under the lock."""
        waiting_rows = self._queued_rows
        if waiting_rows > 0 and waiting_rows + frame.num_rows > self._spec.max_queue_rows:
            error = OverloadedError(f"{waiting_rows} rows wait already", "queue", 0.01)
            return _Refused(_error(frame.request_id, error))
        waiting = _Waiting(frame, now_s)
        self._queued_rows += frame.num_rows
        self._queue.append(waiting)
        return waiting

    def _compute_and_answer(self, batch: list[_Waiting]) -> None:
        """Compute a batch; every frame gets an answer, also after a failure."""
        answers: list[Buffers] = []
        begun_at_s = time.monotonic()
        self._frames += len(batch)
        for waiting in batch:
            self._waited_s += begun_at_s - waiting.since_s
        try:
            answers = self._compute_batch(batch)
        finally:
            if not answers:
                failure = InternalError("the expert actor failed to compute the batch")
                answers = [_error(w.frame.request_id, failure) for w in batch]
            self._busy_s += time.monotonic() - begun_at_s
            self._steps += 1
            with self._lock:
                for done, answer in zip(batch, answers, strict=True):
                    done.answer = answer
                    self._queued_rows -= done.frame.num_rows
                self._computing = False
                if self._blocked:
                    self._changed.notify_all()
        if self._spans is not None:
            self._spans.computed([(w.frame, w.since_s) for w in batch], begun_at_s)

    def _compute_batch(self, batch: Sequence[_Waiting]) -> list[Buffers]:
        """Return an answer to each waiting frame, or an empty list when the batch failed."""
        now_s = time.monotonic()
        is_late = [now_s - w.since_s >= w.frame.time_left_s for w in batch]
        live = [w.frame for w, late in zip(batch, is_late, strict=True) if not late]
        try:
            computed: list[RowsFrame | ErrorFrame] = self._bank.compute(live)
            if len(live) < len(batch):
                results = iter(computed)
                computed = [
                    _late(w.frame) if late else next(results)
                    for w, late in zip(batch, is_late, strict=True)
                ]
            return [encode(answer) for answer in computed]
        except torch.AcceleratorError as error:
            # A device in error fails all that follows. Routers go elsewhere when the process ends.
            logger.critical("%s ends: its device failed (%s)", self._actor_id, error)
            end_process()
            return []
        except Exception:
            # A failure of the device or of torch: every router gets an error, the actor lives on.
            logger.exception("expert actor %s: a batch failed", self._actor_id)
            return []


def _shapes(checkpoint: Checkpoint | Mixture) -> tuple[Shape, Shape]:
    """Return the shapes of an expert's row and of its output."""
    if isinstance(checkpoint, Mixture):
        return checkpoint.spec.rows_input.shape, checkpoint.spec.combine.shape
    hidden = (checkpoint.shape.hidden_size,)
    return hidden, hidden


def _read(data: Buffer) -> DispatchFrame | _Refused:
    """Return a dispatch frame, or the refusal of any other bytes."""
    try:
        frame = decode(data)
        if not isinstance(frame, DispatchFrame):
            raise FrameError("only dispatch frames are computed", "frame.kind")
    except FrameError as error:
        return _Refused(_error(0, error))
    return frame


def _late(frame: DispatchFrame) -> ErrorFrame:
    error = DeadlineExceededError("the frame's time was over before it was computed")
    return ErrorFrame(frame.request_id, type(error).__name__, error)


def _error(request_id: int, error: ExpertMeshError) -> Buffers:
    return encode(ErrorFrame(request_id, type(error).__name__, error))

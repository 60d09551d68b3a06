"""The expert actor: one per device, with any subset of the experts.

The actor loads and releases experts, reports, and keeps its lease. Its frames wait in
:mod:`experts.queue`, and :mod:`experts.bank` computes them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import ray

from cluster.controller.lifecycle.lease import Lease, end_when_orphaned
from cluster.controller.records.last_words import LastWords
from cluster.errors import CheckpointError, StaleEpochError, UnavailableError
from cluster.memory import memory
from cluster.ray_private import ray_store
from cluster.spec import EMULATED, ActorReport, ActorSpec, ExpertKey, ModelKernel
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.transport.stream.server import StreamServer
from cluster.wire.frames import Buffer, DispatchFrame, Shape
from experts.bank import Expert, ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.remote.remote_files import open_model
from experts.checkpoint.remote.remote_reader import RayNeighbours
from experts.checkpoint.stored import RemoteFiles
from experts.compute.emulated import EmulatedExpert
from experts.host_room import HostMemoryGuard
from experts.lone import IS_BUILT
from experts.queue import FrameQueue
from experts.tracing import open_spans

if TYPE_CHECKING:
    from experts.compute.expert_device import ExpertDevice


class ExpertActor:
    """Holds and computes the experts that its controller assigns to it."""

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        """Start without experts; :meth:`load` loads them."""
        self._spec = spec
        self._digest = spec.digest  # what may change of a specification is not in it
        self._actor_id = actor_id
        self._generation = generation
        self._epoch = epoch
        self._sources = {source.experts.model: source for source in spec.models}
        self._no_device: UnavailableError | None = None  # :meth:`load` raises it
        self._device: ExpertDevice | None = None
        if spec.num_gpus:
            try:
                self._device = _device_of(spec, actor_id, generation)
            except UnavailableError as error:
                self._no_device = error
        self._bank = ExpertBank(self._device)
        self._checkpoints: dict[str, Checkpoint | Mixture] = {}
        self._load_lock = threading.Lock()
        self._epoch_lock = threading.Lock()
        self._releasing = threading.Lock()
        self._finite: dict[ExpertKey, bool] = {}
        """Whether an expert's weights are finite in its checkpoint, as far as that is known."""
        self._queue = FrameQueue(
            self._bank,
            actor_id,
            spec.max_queue_rows,
            open_spans(actor_id, generation),
            self._is_sound,
        )
        self.compute_all = self._queue.compute_all
        self._queue.self_test.start()
        tls = None if spec.tls is None else spec.tls.server_context()
        host = ray.util.get_node_ip_address()
        alone = self._queue if IS_BUILT else None
        self._streams = StreamServer(self.compute_all, host, tls, alone)
        self._lease = Lease(time.monotonic())
        end_when_orphaned(self._lease, spec.app)

    # Control calls, on threads of their own (:mod:`experts.remote`).

    def load(self, epoch: int, spec: ActorSpec, keys: Sequence[ExpertKey]) -> ActorReport:
        """Load the given experts beside the held experts; returns when all of them serve.

        ``spec`` is the actor's own from now on, with what may change of it.
        A checkpoint that is not on this node's disk comes from another node. Raises
        :class:`CheckpointError` when no node can read the checkpoint, and for bytes that differ
        from the served checkpoint; the experts loaded before that stay. Raises
        :class:`UnavailableError` when torch does not find the device that Ray has assigned, and
        :class:`NoRoomError` where the memory of the device, or of the host, lacks bytes for the
        experts; the actor goes on with what it holds. A device in error ends the process. Raises
        :class:`StaleEpochError` at the next expert once a newer controller has given an order, so
        that its orders do not wait for the rest.
        """
        self._accept(epoch)
        if self._no_device is not None:
            raise self._no_device
        with self._load_lock:
            self._check(epoch)
            self._take_over(spec)
            self._load(epoch, [ExpertKey(*key) for key in keys])
        return self._report()

    def _take_over(self, spec: ActorSpec) -> None:
        """Go by a specification that may have other models and limits."""
        before, self._spec = self._sources, spec
        self._queue.max_rows = spec.max_queue_rows
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
        does not hold are ignored. Raises :class:`StaleEpochError` for an older epoch.
        """
        self._accept(epoch)
        with self._load_lock, self._queue.idle(), self._releasing:
            self._check(epoch)  # a newer controller's load may have come first
            for key in keys:
                self._bank.release(ExpertKey(*key))
            self._bank.settle()
            self._bank.forget_others(self._sources.keys())
        return self._report()

    def heartbeat(self, epoch: int) -> ActorReport:
        """Renew the lease and report; raises :class:`StaleEpochError` for an older epoch."""
        self._accept(epoch)
        return self._report()

    def describe(self, epoch: int = 0) -> ActorReport:
        """Report without renewing the lease.

        A controller that adopts the actor gives its ``epoch``. From the report on, no controller of
        an older one takes experts away. The report has the highest epoch before.
        """
        with self._epoch_lock:
            before = self._epoch
            self._epoch = max(before, epoch)
        with self._releasing:
            return replace(self._report(), epoch=before)

    def offer_stream(self, network: Network) -> StreamOffer:
        """Return the offer of one stream to this actor; raises ``OSError`` if it cannot listen."""
        return self._streams.offer(network)

    def _accept(self, epoch: int) -> None:
        with self._epoch_lock:
            self._check(epoch)
            self._epoch = epoch
        self._lease.renew(time.monotonic())

    def _check(self, epoch: int) -> None:
        """Raise :class:`StaleEpochError` where a newer controller has given an order."""
        if epoch < self._epoch:
            raise StaleEpochError(f"is older than {self._epoch} (given: {epoch})", "epoch")

    def _load(self, epoch: int, keys: Sequence[ExpertKey]) -> None:
        """Load experts that are not held yet; under the lock of loads."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._bank]
        room = HostMemoryGuard(self._host_bytes(missing))
        try:
            if self._device is not None:
                self._device.begin_load(self._needed_bytes(missing))
            for key in missing:
                self._check(epoch)
                room.take(key)
                checkpoint = self._checkpoint(key.model)
                try:
                    expert = self._load_expert(checkpoint, key)
                except CheckpointError:
                    del self._checkpoints[key.model]  # the next load looks at the files anew
                    raise
                self._bank.hold(key, expert)
            for remote in self._remotes():
                remote.release()
        finally:
            if self._device is not None:
                self._device.end_load()
            self._bank.settle()

    def _needed_bytes(self, keys: Sequence[ExpertKey]) -> dict[ExpertKey, int]:
        """Return the device's memory that each expert takes; those on the host are left out."""
        needed = {}
        for key in keys:
            checkpoint = self._checkpoint(key.model)
            if isinstance(checkpoint, Checkpoint):  # the experts of mixtures are on the host
                needed[key] = checkpoint.expert_bytes(self._sources[key.model].dtype)
        return needed

    def _host_bytes(self, keys: Sequence[ExpertKey]) -> dict[ExpertKey, int]:
        """Return the host's memory that each expert takes; those on the device are left out."""
        if self._spec.emulation is not None:
            return {}
        sizes = {model: source.experts.expert_bytes for model, source in self._sources.items()}
        there = {} if self._device is None else self._needed_bytes(keys)
        return {key: sizes[key.model] for key in keys if key not in there}

    def _checkpoint(self, model: str) -> Checkpoint | Mixture:
        if model not in self._checkpoints:
            source = self._sources[model]
            self._checkpoints[model] = open_model(source.path, source.identity, RayNeighbours())
        return self._checkpoints[model]

    def _load_expert(self, checkpoint: Checkpoint | Mixture, key: ExpertKey) -> Expert:
        dtype, threads = self._sources[key.model].dtype, self._spec.threads
        if self._spec.emulation is not None:
            return EmulatedExpert(self._spec.emulation, *_shapes(checkpoint), dtype)
        if isinstance(checkpoint, Mixture):
            from experts.backends.load import load_mixture_expert  # imports scikit-learn

            return load_mixture_expert(checkpoint, key.expert_id, threads)
        weights = load_expert(checkpoint, key.layer_id, key.expert_id, dtype)
        activation = checkpoint.shape.activation
        if self._device is not None:
            return self._device.load(key, weights, activation)
        return GatedFfnExpert(weights, activation, threads)

    def _is_sound(self, frame: DispatchFrame) -> bool:
        """Return whether a frame's experts are gated ones with finite weights in their checkpoint.

        Experts of mixtures are not: they may map any row to NaN or infinity by right.
        """
        keys = [ExpertKey(frame.model, frame.layer_id, e) for e in frame.expert_ids]
        return all(self._has_finite_weights(key) for key in keys)

    def _has_finite_weights(self, key: ExpertKey) -> bool:
        if key not in self._finite:
            with self._load_lock:
                source = self._sources.get(key.model)
                checkpoint = None if source is None else self._checkpoint(key.model)
                if source is None or not isinstance(checkpoint, Checkpoint):
                    return False
                weights = load_expert(checkpoint, key.layer_id, key.expert_id, source.dtype)
            self._finite[key] = all(bool(np.isfinite(part).all()) for part in weights.parts())
        return self._finite[key]

    def _remotes(self) -> list[RemoteFiles]:
        return [c.remote for c in self._checkpoints.values() if c.remote is not None]

    def _report(self) -> ActorReport:
        remotes, experts = self._remotes(), self._bank.experts
        context = ray.get_runtime_context()
        device = self._device_name()
        if self._device is not None:  # torch calls each process's own the first
            device += ":" + ",".join(sorted(context.get_accelerator_ids()["GPU"]))
        return ActorReport(
            actor_id=self._actor_id,
            generation=self._generation,
            digest=self._digest,
            epoch=self._epoch,
            pid=os.getpid(),
            node=context.get_node_id(),
            device=device,
            experts=tuple(sorted(experts)),
            weight_bytes=self._bank.num_bytes,
            tokens=self._bank.tokens,
            queued_rows=self._queue.queued_rows,
            steps=self._queue.steps,
            frames=self._queue.frames,
            busy_s=self._queue.busy_s,
            waited_s=self._queue.waited_s,
            fetched_bytes=sum(remote.fetched_bytes for remote in remotes),
            fetched_s=sum(remote.fetched_s for remote in remotes),
            free_bytes=(
                memory().available_bytes if self._device is None else self._device.free_bytes
            ),
            kernels=kernels_of(experts),
            failed_batches=self._queue.self_test.failed_batches,
            failed_tests=self._queue.self_test.failed_tests,
            failure=self._queue.self_test.failure,
        )

    def _device_name(self) -> str:
        if self._spec.emulation is not None:
            return EMULATED
        return "cpu" if self._device is None else self._device.name

    # Data plane.

    def compute(self, data: Buffer) -> bytes:
        """Answer one frame of a Ray call; see :meth:`FrameQueue.compute_all`."""
        return b"".join(next(self.compute_all([data])))


def _device_of(spec: ActorSpec, actor_id: str, generation: int) -> ExpertDevice:
    """Return the device that Ray has assigned; raises :class:`UnavailableError` without one."""
    from cluster.device import device_of  # imports torch, as the next
    from experts.compute.expert_device import ExpertDevice

    device = device_of("auto", spec.num_gpus, "args.experts.num_gpus")
    say_last = partial(LastWords(spec.app, ray_store()).leave, actor_id, generation)
    return ExpertDevice(device, actor_id, say_last)


def kernels_of(experts: Mapping[ExpertKey, Expert]) -> tuple[ModelKernel, ...]:
    """Return the kernel classes of experts by model, without those of no class."""
    found = {ModelKernel(key.model, expert.kernel_class) for key, expert in experts.items()}
    return tuple(sorted(kernel for kernel in found if kernel.kernel_class))


def _shapes(checkpoint: Checkpoint | Mixture) -> tuple[Shape, Shape]:
    """Return the shapes of an expert's row and of its output."""
    if isinstance(checkpoint, Mixture):
        return checkpoint.spec.rows_input.shape, checkpoint.spec.combine.shape
    hidden = (checkpoint.shape.hidden_size,)
    return hidden, hidden

"""The kernel classes that compute each language model, and the notice when they are mixed.

A row's result depends only on the row, the weights and the kernel class. So answers may change in
their last bits if a model's experts, or its routers, have several classes.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.placement.placement import Placement
from cluster.reports import KernelCount, KernelStatus
from cluster.spec import EMULATED, UNKNOWN, ActorReport, ModelKernel, model_id_of

logger = logging.getLogger("expertmesh.controller")


def kernel_status(
    models: Sequence[str],
    actors: Iterable[Collection[ModelKernel]],
    routers: Iterable[Collection[ModelKernel]],
) -> tuple[KernelStatus, ...]:
    """Return the kernel classes of each of ``models`` that has any.

    ``actors`` and ``routers`` are the kernels of each process. A process counts once for each class
    that it has for a model.
    """
    of_actors, of_routers = Counter(_each(actors)), Counter(_each(routers))
    found = []
    for model in models:
        experts, dense = _counts(model, of_actors), _counts(model, of_routers)
        if experts or dense:
            parts = (_mixed(experts, "actor"), _mixed(dense, "router"))
            found.append(KernelStatus(model, experts, dense, "; ".join(filter(None, parts))))
    return tuple(found)


def with_ids(kernels: Iterable[ModelKernel], keys: Collection[str]) -> tuple[ModelKernel, ...]:
    """Return the kernels of the models with these keys, named by the models' ids."""
    own = (kernel for kernel in kernels if kernel.model in keys)
    return tuple(replace(kernel, model=model_id_of(kernel.model)) for kernel in own)


def _each(processes: Iterable[Collection[ModelKernel]]) -> Iterable[ModelKernel]:
    return (kernel for kernels in processes for kernel in set(kernels))


def _counts(model: str, processes: Mapping[ModelKernel, int]) -> tuple[KernelCount, ...]:
    """Return a model's classes, the most frequent first."""
    counts = [KernelCount(k.kernel_class, n) for k, n in processes.items() if k.model == model]
    return tuple(sorted(counts, key=lambda count: (-count.processes, count.kernel_class)))


def _mixed(counts: Sequence[KernelCount], noun: str) -> str:
    """Return several classes as a string, such as "fused on 2 actors, paired on 1"."""
    if len(counts) < 2:
        return ""
    first, *others = counts
    nouns = noun if first.processes == 1 else f"{noun}s"
    parts = [f"{first.kernel_class} on {first.processes} {nouns}"]
    parts += [f"{other.kernel_class} on {other.processes}" for other in others]
    return ", ".join(parts)


class ExpertKernels:
    """The kernel classes that actors have reported, per process; emulated actors have none.

    They are kept while an actor is silent or comes up again and has no report.
    """

    def __init__(self) -> None:
        """Begin without an actor."""
        self._told: dict[str, tuple[int, Collection[ModelKernel] | None]] = {}
        self._placement: Placement | None = None
        self._holders: defaultdict[str, set[str]] = defaultdict(set)
        """The actors that hold experts of each model in ``_placement``."""

    def note(self, report: ActorReport) -> None:
        """Take an actor's report."""
        kernels = None if report.device == EMULATED else report.kernels
        self._told[report.actor_id] = report.generation, kernels

    def classes(self, model: str, placement: Placement) -> frozenset[str]:
        """Return the classes that compute the placed experts of the model with this key.

        :data:`UNKNOWN` is among them if an actor has reported none.
        """
        if self._placement is not placement:
            self._placement = placement
            self._holders.clear()
            for key, actor_ids in placement.holders.items():
                self._holders[key.model].update(actor_ids)
        found: set[str] = set()
        for actor_id in self._holders.get(model, ()):
            generation, kernels = self._told.get(actor_id, (0, ()))
            if generation != placement.generations.get(actor_id):
                kernels = ()
            if kernels is not None:
                found |= {k.kernel_class for k in kernels if k.model == model} or {UNKNOWN}
        return frozenset(found)


class MixNotice:
    """Logs mixed classes, once for each set of classes that a model has."""

    def __init__(self) -> None:
        """Begin without a notice."""
        self._noticed: dict[str, tuple[frozenset[str], frozenset[str]]] = {}

    def look(self, kernels: Iterable[KernelStatus], is_whole: Callable[[], bool]) -> None:
        """Log the models whose classes are mixed differently than at their last notice.

        While the cluster is not whole, the notice waits, so that it does not count a cluster that
        is still starting.
        """
        for status in kernels:
            classes = _names(status.actors), _names(status.routers)
            if status.mixed and self._noticed.get(status.model) != classes and is_whole():
                self._noticed[status.model] = classes
                logger.warning(
                    "the kernels of %s are mixed: %s; answers may differ in their last bits from "
                    "one process to another",
                    status.model,
                    status.mixed,
                )


def _names(counts: Iterable[KernelCount]) -> frozenset[str]:
    return frozenset(count.kernel_class for count in counts)

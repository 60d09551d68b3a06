"""All metrics in Prometheus' text format.

The answer of any gateway has the numbers of the whole application, so that a scrape through a load
balancer is right. The label ``replica`` separates the numbers of processes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from cluster.reports import ClusterStatus, Measurements, ProcessSamples, Sample
from cluster.spec import ActorReport
from router.observability import catalogue
from router.observability.catalogue import FAMILIES, Family

_Samples = dict[str, list[Sample]]


def expose(measured: Measurements, loop_age_s: float | None) -> bytes:
    """Return all metrics as text; the placement's gauges are NaN while the controller is away.

    ``loop_age_s`` is the time since the controller's last known loop.
    """
    samples: _Samples = defaultdict(list)
    _gauge(samples, catalogue.LOOP_AGE, math.nan if loop_age_s is None else loop_age_s)
    if measured.status is None:
        for family in (catalogue.EPOCH, catalogue.VERSION, catalogue.MISSING):
            _gauge(samples, family, math.nan)
    else:
        _add_cluster(samples, measured.status)
    for report in measured.reports:
        _add_actor(samples, report)
    for measurement in measured.processes:
        _add_process(samples, measurement)
    return generate_latest(_Families(samples))


class _Families(Collector):
    """The metrics of ``FAMILIES``, in that order."""

    def __init__(self, samples: _Samples) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            metric = Metric(family.name, family.help, family.kind)
            for name, labels, value in self._samples.get(family.name, ()):
                metric.add_sample(name, dict(labels), value)
            yield metric


def _gauge(samples: _Samples, family: Family, value: float, **labels: str) -> None:
    samples[family.name].append((family.exported, labels, float(value)))


def _add_process(samples: _Samples, measurement: ProcessSamples) -> None:
    process = measurement.process
    replica = {"replica": f"{process.node[:10]}:{process.pid}"}
    for family, values in measurement.samples.families.items():
        samples[family] += [(name, {**labels, **replica}, value) for name, labels, value in values]


def _add_cluster(samples: _Samples, status: ClusterStatus) -> None:
    _gauge(samples, catalogue.EPOCH, status.epoch)
    _gauge(samples, catalogue.VERSION, status.placement_version)
    _gauge(samples, catalogue.MISSING, status.missing_experts)
    _gauge(samples, catalogue.LIVE_COPIES, status.live_copies)
    _gauge(samples, catalogue.MIN_COPIES, status.min_copies)
    _gauge(samples, catalogue.PROCESSES, len(status.routers), kind="router")
    _gauge(samples, catalogue.PROCESSES, len(status.gateways), kind="gateway")
    _gauge(samples, catalogue.PROCESSES, len(status.actors), kind="actor")
    for actor in status.actors:
        if actor.slowness:
            _gauge(samples, catalogue.ACTOR_SLOWNESS, actor.slowness, actor_id=actor.actor_id)
    for kernels in status.kernels:
        for kind, counts in (("router", kernels.routers), ("actor", kernels.actors)):
            for count in counts:
                labels = {"model_name": kernels.model, "kind": kind}
                labels["kernel_class"] = count.kernel_class
                _gauge(samples, catalogue.KERNELS, count.processes, **labels)
    for failing in status.failing:
        _gauge(samples, catalogue.ACTOR_DEATHS, failing.deaths, actor_id=failing.actor_id)
        _gauge(samples, catalogue.ACTOR_RETRY, failing.retry_in_s, actor_id=failing.actor_id)
        _gauge(
            samples, catalogue.ACTOR_MISSING_BYTES, failing.missing_bytes, actor_id=failing.actor_id
        )


def _add_actor(samples: _Samples, report: ActorReport) -> None:
    for family, value in (
        (catalogue.ACTOR_EXPERTS, len(report.experts)),
        (catalogue.ACTOR_WEIGHTS, report.weight_bytes),
        (catalogue.ACTOR_QUEUED, report.queued_rows),
        (catalogue.ACTOR_BATCHES, report.steps),
        (catalogue.ACTOR_FRAMES, report.frames),
        (catalogue.ACTOR_BUSY, report.busy_s),
        (catalogue.ACTOR_QUEUE, report.waited_s),
        (catalogue.ACTOR_REPLACEMENTS, report.generation - 1),
        (catalogue.ACTOR_FAILED_BATCHES, report.failed_batches),
        (catalogue.ACTOR_FAILED_TESTS, report.failed_tests),
    ):
        _gauge(samples, family, value, actor_id=report.actor_id)
    for key, rows in report.tokens.items():
        _gauge(
            samples,
            catalogue.EXPERT_TOKENS,
            rows,
            model_name=key.model,
            layer=str(key.layer_id),
            expert=str(key.expert_id),
            actor_id=report.actor_id,
        )

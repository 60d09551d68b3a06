"""Everything that is measured, in Prometheus' text format.

One answer has the whole application's numbers, whichever gateway is asked, so that a scrape through
a load balancer is right: what processes count of themselves is told apart by ``replica``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from cluster.reports import ClusterStatus, Measurements, ProcessStatus, Sample, Samples
from cluster.spec import ActorReport
from router.observability import catalogue
from router.observability.catalogue import FAMILIES, Family

_Found = dict[str, list[Sample]]


def expose(measured: Measurements, loop_age_s: float | None) -> bytes:
    """Return all metrics as text; the placement's gauges are NaN while the controller is away.

    ``loop_age_s`` is what this gateway knows of the controller's last loop.
    """
    found: _Found = defaultdict(list)
    _gauge(found, catalogue.LOOP_AGE, math.nan if loop_age_s is None else loop_age_s)
    if measured.status is None:
        for family in (catalogue.EPOCH, catalogue.VERSION, catalogue.MISSING):
            _gauge(found, family, math.nan)
    else:
        _add_cluster(found, measured.status)
    for report in measured.reports:
        _add_actor(found, report)
    for one in measured.processes:
        _add(found, one.process, one.samples)
    registry = CollectorRegistry()
    registry.register(_Told(found))
    return generate_latest(registry)


class _Told(Collector):
    def __init__(self, found: _Found) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            metric = Metric(family.name, family.help, family.kind)
            for name, labels, value in self._found.get(family.name, ()):
                metric.add_sample(name, dict(labels), value)
            yield metric


def _gauge(found: _Found, family: Family, value: float, **labels: str) -> None:
    found[family.name].append((family.exported, labels, float(value)))


def _add(found: _Found, process: ProcessStatus, samples: Samples) -> None:
    replica = {"replica": f"{process.node[:10]}:{process.pid}"}
    for name, values in samples.families.items():
        found[name] += [(sample, {**labels, **replica}, value) for sample, labels, value in values]


def _add_cluster(found: _Found, status: ClusterStatus) -> None:
    _gauge(found, catalogue.EPOCH, status.epoch)
    _gauge(found, catalogue.VERSION, status.placement_version)
    _gauge(found, catalogue.MISSING, status.missing_experts)
    _gauge(found, catalogue.LIVE_COPIES, status.live_copies)
    _gauge(found, catalogue.MIN_COPIES, status.min_copies)
    groups: Iterable[tuple[str, int]] = (
        ("router", len(status.routers)),
        ("gateway", len(status.gateways)),
        ("actor", len(status.actors)),
    )
    for kind, count in groups:
        _gauge(found, catalogue.PROCESSES, count, kind=kind)


def _add_actor(found: _Found, report: ActorReport) -> None:
    for family, value in (
        (catalogue.ACTOR_EXPERTS, len(report.experts)),
        (catalogue.ACTOR_WEIGHTS, report.weight_bytes),
        (catalogue.ACTOR_QUEUED, report.queued_rows),
        (catalogue.ACTOR_BATCHES, report.steps),
        (catalogue.ACTOR_FRAMES, report.frames),
        (catalogue.ACTOR_BUSY, report.busy_s),
        (catalogue.ACTOR_QUEUE, report.waited_s),
        (catalogue.ACTOR_REPLACEMENTS, report.generation - 1),
    ):
        _gauge(found, family, value, actor_id=report.actor_id)
    for key, rows in report.tokens.items():
        _gauge(
            found,
            catalogue.EXPERT_TOKENS,
            rows,
            model_name=key.model,
            layer=str(key.layer_id),
            expert=str(key.expert_id),
            actor_id=report.actor_id,
        )

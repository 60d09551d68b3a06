"""What is counted, against Prometheus' own client; names, against the documentation and dashboard.

The names that a running cluster exports are looked at in ``tests/integration/test_metrics.py``.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram

from cluster.reports import Measurements
from router.engine.stats import RouterSamples
from router.messages.request import GenerationRequest, Received
from router.observability import catalogue
from router.observability.catalogue import FAMILIES, LAYER_BUCKETS_S, Family
from router.observability.exposition import expose
from router.observability.histogram import Distribution, histogram_of
from tests.checkpoints import save_mixtral
from tests.local_cluster import MODEL, LocalCluster, greedy_request
from tests.observed import dashboard_names, panels
from tests.unit.gateway_fakes import REPORT, STATUS

DOCUMENT = Path(__file__).parents[4] / "docs" / "observability.md"


@pytest.mark.parametrize("count", [0, 1, 200])
def test_a_distribution_counts_as_prometheus_client_does(count: int) -> None:
    source = random.Random(count)
    values = [source.choice([*LAYER_BUCKETS_S, source.expovariate(1)]) for _ in range(count)]
    registry = CollectorRegistry()
    theirs = Histogram("h", "h", ["model_name"], buckets=LAYER_BUCKETS_S, registry=registry)
    ours = Distribution(LAYER_BUCKETS_S)
    child = theirs.labels("m")
    for value in values:
        child.observe(value)
        ours.add(value)
    [counted] = registry.collect()
    expected = [(s.name, s.labels, s.value) for s in counted.samples if "_created" not in s.name]
    family = Family("h", "histogram", ("model_name",), "h")
    assert list(histogram_of(family, ours, {"model_name": "m"})) == expected


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder)
    cluster = LocalCluster(folder)
    yield cluster
    cluster.close()


def counted(cluster: LocalCluster) -> dict[str, float]:
    """The router's samples but buckets, without the one label that all of them have."""
    samples = RouterSamples(
        MODEL, cluster.engine.tally, cluster.scheduler, cluster.dispatcher, cluster.overflow
    )()
    found = {}
    for family in samples.families.values():
        for name, labels, value in family:
            assert labels["model_name"] == MODEL
            if not name.endswith("_bucket"):
                others = [v for k, v in labels.items() if k != "model_name"]
                found[":".join([name.removeprefix(catalogue.PREFIX), *others])] = value
    return found


def grown(cluster: LocalCluster, *requests: GenerationRequest) -> dict[str, float]:
    """How much each number grows by a run of requests."""
    before = counted(cluster)
    cluster.generate(*requests)
    return {name: value - before.get(name, 0.0) for name, value in counted(cluster).items()}


def test_a_router_counts_sequences_and_tokens(cluster: LocalCluster) -> None:
    sizes = [(3, 1), (20, 7), (100, 2)]  # the last prompt takes two steps
    requests = [
        greedy_request(f"r{i}", range(2 + i, 2 + i + length), count)
        for i, (length, count) in enumerate(sizes)
    ]
    started_s = time.monotonic()
    told = grown(cluster, *requests)
    took_s = time.monotonic() - started_s
    for name in ("request_queue_time", "request_prefill_time", "request_decode_time"):
        assert told[f"{name}_seconds_count"] == len(sizes)
        assert 0 <= told[f"{name}_seconds_sum"] <= len(sizes) * took_s
    gaps = sum(count - 1 for _, count in sizes)
    assert told["inter_token_latency_seconds_count"] == gaps
    # Both are the time between the tokens, in pieces and in whole.
    whole_s = told["request_decode_time_seconds_sum"]
    assert told["inter_token_latency_seconds_sum"] == pytest.approx(whole_s)
    assert told["engine_step_tokens_total"] == sum(length + count - 1 for length, count in sizes)
    layers = len(cluster.checkpoint.shape.layers)
    assert told["moe_layer_seconds_count"] == layers * told["engine_steps_total"]
    assert told["num_requests_running"] == told["num_requests_waiting"] == 0
    assert told["kv_cache_usage_perc"] == 0


def test_a_router_counts_what_it_found_of_prompts(cluster: LocalCluster) -> None:
    prompt = range(40, 100)
    first = grown(cluster, greedy_request("first", prompt, 2))
    again = grown(cluster, greedy_request("again", prompt, 2, n=2))
    queries, hits = "prefix_cache_queries_total", "prefix_cache_hits_total"
    assert (first[queries], first[hits], first["engine_step_tokens_total"]) == (60, 0, 61)
    assert (again[queries], again[hits], again["engine_step_tokens_total"]) == (120, 96, 26)
    assert again["kv_cache_usage_perc"] == 0


def test_tokens_that_came_with_a_request_are_not_counted_again(cluster: LocalCluster) -> None:
    [[whole]] = cluster.generate(greedy_request("whole", [5, 6, 7], 6))
    rest = greedy_request("rest", [5, 6, 7], 6)
    told = grown(cluster, replace(rest, received=(Received(whole.token_ids[:3]),)))
    assert told["inter_token_latency_seconds_count"] == 2
    assert told["request_prefill_time_seconds_count"] == 0
    assert told["request_decode_time_seconds_count"] == 0
    assert told["request_queue_time_seconds_count"] == 1


def test_a_router_tells_what_runs_waits_and_is_parked(cluster: LocalCluster) -> None:
    layers, experts = cluster.checkpoint.shape.layers, cluster.checkpoint.shape.num_experts
    cluster.lose((layer, expert) for layer in layers for expert in range(experts))
    cluster.engine.submit(greedy_request("parked", [5, 6, 7], 4))
    deadline_s = time.monotonic() + 20
    while not (told := counted(cluster))["num_requests_parked"]:
        assert time.monotonic() < deadline_s
    assert told["num_requests_running"] == 1
    assert 0 < told["kv_cache_usage_perc"] < 1
    cluster.lose(())
    [event] = cluster.result(greedy_request("parked", [5, 6, 7], 4))
    assert len(event.token_ids) == 4


def test_a_scrape_has_the_failing_actors() -> None:
    lines = expose(Measurements(STATUS, (replace(REPORT, failed_tests=2),), ()), 0.0).decode()
    for line in (
        'expertmesh_actor_deaths_in_a_row{actor_id="a2"} 3.0',
        'expertmesh_actor_retry_seconds{actor_id="a2"} 12.5',
        'expertmesh_actor_missing_bytes{actor_id="a2"} 5.0',
        f'expertmesh_actor_failed_tests{{actor_id="{REPORT.actor_id}"}} 2.0',
        f'expertmesh_actor_failed_batches_total{{actor_id="{REPORT.actor_id}"}} 0.0',
    ):
        assert line in lines.splitlines()


def test_every_metric_is_documented_and_nothing_else() -> None:
    rows = re.findall(r"^\| `(expertmesh_\w+)` \| (.*) \|$", DOCUMENT.read_text("utf-8"), re.M)
    expected = [
        (f.exported, " | ".join([f.kind, ", ".join(f"`{name}`" for name in f.labels), f.help]))
        for f in FAMILIES
    ]
    assert sorted(rows) == sorted(expected)


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    families = {family.name: family for family in FAMILIES}
    assert len(panels()) > 10
    for panel in panels():
        for target in panel["targets"]:
            names = dashboard_names(target["expr"])
            assert names, panel["title"]
            allowed = {"le"}
            for name in names:
                base = re.sub(r"_(total|bucket|sum|count)$", "", name)
                family = families[base]
                suffixes = {"counter": ("_total",), "gauge": ("",)}
                of_histogram = ("_bucket", "_sum", "_count")
                assert name.removeprefix(base) in suffixes.get(family.kind, of_histogram)
                allowed |= set(family.labels)
            asked = re.findall(r"by \(([^)]*)\)", target["expr"])
            labels = {label.strip() for group in asked for label in group.split(",")}
            labels |= set(re.findall(r"(\w+)=~?\"", target["expr"]))
            assert labels <= allowed, panel["title"]

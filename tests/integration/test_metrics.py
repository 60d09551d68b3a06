"""One scrape of the running cluster: all names, and numbers that agree with what was done."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.client import Sampling
from router.observability import catalogue
from router.observability.catalogue import FAMILIES, Family
from tests.cluster_fixture import LAYERS, RANDOM, TOP_K, ServedCluster, prompt_of, wait_until
from tests.observed import dashboard_names, panels

RARE = {
    catalogue.RETRIES,
    catalogue.INEXACT_TOKENS,
    catalogue.OVERFLOW,
    catalogue.SLOW_READERS,
    catalogue.REFUSED_CALLERS,
    catalogue.KEY_REQUESTS,
    catalogue.KEY_TOKENS,
    catalogue.KEY_REFUSALS,
    catalogue.PREDICTION_ROWS,
    catalogue.INEXACT_ROWS,
    catalogue.ACTOR_DEATHS,
    catalogue.ACTOR_RETRY,
    catalogue.ACTOR_MISSING_BYTES,
    catalogue.ACTOR_SLOWNESS,
}
"""Without a sample until something goes wrong, an expert is at its capacity, a mixture predicts,
clients have keys, or routers have measured actors side by side.

``tests/fault/test_mixtures.py`` looks at the rows of predictions."""

Labels = frozenset[tuple[str, str]]


class Scrape:
    """What Prometheus would read."""

    def __init__(self, served: ServedCluster) -> None:
        text = httpx.get(f"{served.http_url}/metrics").text
        self.kinds: dict[str, str] = {}
        self.samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            self.kinds[family.name] = family.type
            for sample in family.samples:
                labels = frozenset(sample.labels.items())
                self.samples.setdefault(sample.name, {})[labels] = sample.value

    def total(self, family: Family, suffix: str = "", **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        found = self.samples.get(family.exported + suffix, {})
        return sum(value for has, value in found.items() if labels.items() <= set(has))


def test_a_scrape_has_every_metric_of_the_catalogue_and_of_the_dashboard(
    served: ServedCluster,
) -> None:
    served.client.generate(prompt_of(5, 1), Sampling(max_tokens=2), model=RANDOM)

    def complete() -> bool:
        told = Scrape(served)
        return all(
            any(name.startswith(family.name) for name in told.samples)
            for family in FAMILIES
            if family not in RARE
        )

    wait_until(complete, "routers and actors have told what they measure", 10)
    told = Scrape(served)
    assert told.kinds == {family.name: family.kind for family in FAMILIES}
    for family in FAMILIES:
        for name, samples in told.samples.items():
            if name in {family.exported, f"{family.name}_bucket", f"{family.name}_count"}:
                allowed = {*family.labels, *(["le"] if name.endswith("_bucket") else [])}
                assert all({key for key, _ in labels} == allowed for labels in samples), name
    rare = {family.exported for family in RARE}
    asked = {n for p in panels() for t in p["targets"] for n in dashboard_names(t["expr"])}
    assert asked - rare <= set(told.samples)


def test_requests_go_to_routers_over_links_once_these_are_known(served: ServedCluster) -> None:
    def calls(transport: str) -> float:
        return Scrape(served).total(catalogue.ROUTER_CALLS, model_name=RANDOM, transport=transport)

    def goes_over_a_link() -> bool:
        before = calls("link")
        served.client.generate(prompt_of(5, 1), Sampling(max_tokens=1), model=RANDOM)
        return calls("link") == before + 1

    wait_until(goes_over_a_link, "the gateway has asked for the routers", 10)


@pytest.mark.parametrize("on", ["http", "grpc"])
def test_a_request_is_counted_in_the_gateway_the_router_and_the_actors(
    served: ServedCluster, on: str
) -> None:
    served.settled_tokens()
    before = Scrape(served)
    count, prompt = 6, prompt_of(9, 4)
    if on == "http":
        body = {"model": RANDOM, "prompt": prompt, "max_tokens": count, "ignore_eos": True}
        assert httpx.post(f"{served.http_url}/v1/completions", json=body).status_code == 200
    else:
        sampling = Sampling(max_tokens=count, ignore_eos=True)
        served.client.generate(prompt, sampling, model=RANDOM)

    def grown(family: Family, suffix: str = "", **labels: str) -> float:
        now = Scrape(served)
        return now.total(family, suffix, **labels) - before.total(family, suffix, **labels)

    model = {"model_name": RANDOM}
    assert grown(catalogue.REQUESTS, surface=on, code="ok") == 1
    assert grown(catalogue.SUCCESS, finished_reason="length", **model) == 1
    assert grown(catalogue.PROMPT_TOKENS, **model) == len(prompt)
    assert grown(catalogue.GENERATION_TOKENS, **model) == count
    assert grown(catalogue.FIRST_TOKEN, "_count", **model) == 1
    assert grown(catalogue.LATENCY, "_count", **model) == 1
    assert grown(catalogue.IN_FLIGHT, **model) == 0
    computed = len(prompt) + count - 1
    rows = (
        computed * (LAYERS[RANDOM] - 1) + count
    ) * TOP_K  # in the last layer, those sampled from
    wait_until(lambda: grown(catalogue.EXPERT_TOKENS, **model) == rows, "heartbeats came", 10)
    wait_until(lambda: grown(catalogue.STEP_TOKENS, **model) == computed, "a watch call came", 10)
    assert grown(catalogue.INTER_TOKEN, "_count", **model) == count - 1
    assert grown(catalogue.DECODE_TIME, "_count", **model) == 1
    assert grown(catalogue.STEPS, **model) == count
    assert grown(catalogue.LAYER_TIME, "_count", **model) == count * LAYERS[RANDOM]
    frames = grown(catalogue.CALLS, **model)
    assert count * LAYERS[RANDOM] <= frames
    assert grown(catalogue.ACTOR_FRAMES) == frames
    assert 0 < grown(catalogue.ACTOR_BUSY) < 60

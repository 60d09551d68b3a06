"""Folders that prune, merge and upcycle have made, their experts in actors on Ray.

The actors are specified, started and loaded as the controller does, and called over the product's
transport by an engine in the test's process. ``tests/long`` serves such folders as a whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.controller.records.pool import ExpertPool
from cluster.placement.placement import assign_experts, empty_placement
from cluster.transport.open import open_transport
from experts.remote import RemoteExpertActor
from router.config.deployment import parse_args
from router.served import inspect_models, pool_specs
from tests.local_cluster import LocalCluster, greedy_request
from tests.made_folders import FAMILIES, PROMPTS, expected_tokens, make_folders, make_upcycled

APP = "made-folders"
LIMIT_S = 60.0
GENERATION = EPOCH = 1


@contextmanager
def in_actors(folders: Mapping[str, Path]) -> Iterator[dict[str, LocalCluster]]:
    """Give an engine for each folder; two actors have the experts of all."""
    given = [{"id": name, "path": str(folder)} for name, folder in folders.items()]
    config = parse_args({"models": given, "experts": {"actors": 2}})
    models = inspect_models(config)
    [specs] = pool_specs(config.experts, models)
    spec = replace(specs.actor, app=APP)
    experts = [model.source.experts for model in models]
    shares = assign_experts(experts, specs.actor_ids(), None, config.experts.min_copies)
    pool, placement = ExpertPool(APP, RemoteExpertActor), empty_placement(1, experts)
    handles = [pool.create(spec, actor_id, GENERATION, EPOCH) for actor_id in shares]
    transport = open_transport(APP, "auto")
    clusters = {}
    try:
        for handle, (actor_id, keys) in zip(handles, shares.items(), strict=True):
            asyncio.run(pool.load(handle, EPOCH, spec, keys, LIMIT_S))
            placement = placement.with_actor(actor_id, GENERATION, keys)
        for model in models:
            elsewhere = (model.key, transport, placement)
            clusters[model.id] = LocalCluster(folders[model.id], elsewhere=elsewhere)
        yield clusters
    finally:
        for cluster in clusters.values():
            cluster.close()
        transport.close()
        for handle in handles:
            pool.kill(handle)


@pytest.mark.usefixtures("served")
def test_experts_of_made_folders_give_transformers_tokens(tmp_path: Path) -> None:
    folders = make_folders(FAMILIES, tmp_path) | make_upcycled(tmp_path)
    with in_actors(folders) as clusters:
        for name, cluster in clusters.items():
            for prompt, count in PROMPTS:
                request = replace(greedy_request(f"{len(prompt)}", prompt, count), model=name)
                [[event]] = cluster.generate(request)
                assert event.token_ids == expected_tokens(folders[name], prompt, count), name
            calls = cluster.dispatcher._transport.calls
            assert calls["stream"] + calls["ray"] > 0

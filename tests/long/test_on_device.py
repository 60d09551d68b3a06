"""A whole deployment on emulated devices: the host's tokens, in all families and under faults.

The emulated device fails on an implicit read by the host and on an operation of both, so that each
answer says that there was none.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import torch
from ray import serve

from benchmarks.shipped import free_ports, with_ports
from cluster.reports import ClusterStatus
from cluster.spec import ActorSpec
from experts.compute.device_experts import Block
from experts.remote import RemoteExpertActor
from router.app import application
from router.client import Client
from router.config.capacity import CapacityConfig
from router.serve.controller import ControllerDeployment
from tests.checkpoints import save_mixtral, save_tokenizer
from tests.cluster_fixture import (
    APP,
    DEVICE_SHARE,
    RANDOM,
    TINY,
    ServedCluster,
    Shape,
    StreamReader,
    greedy,
    prompt_of,
    wait_until,
)
from tests.family_checkpoints import SAVERS
from tests.fault.faults import BEFORE, LENGTH, PROMPTS, expected_tokens, kill, start_streams
from tests.grok_oracle import save_grok
from tests.local_cluster import LocalCluster, greedy_request

pytestmark = [
    pytest.mark.parametrize("served_session", [Shape(on_device=True)], ids=str, indirect=True),
    pytest.mark.timeout(600),
]

FAMILIES: dict[str, Any] = {
    "mixtral": save_mixtral,
    "grok-1": save_grok,
    "grok": partial(save_grok, style="grok"),
    **SAVERS,
}
BACK_S = 120.0
COUNT = 6


def test_a_crowd_with_long_prompts_gets_transformers_tokens(served: ServedCluster) -> None:
    sizes = [(1 + (29 * i) % 250, 2 + (5 * i) % 6) for i in range(16)]
    prompts = [prompt_of(length, 100 + i) for i, (length, _) in enumerate(sizes)]
    got = served.crowd(RANDOM, prompts, [greedy(count) for _, count in sizes])
    for prompt, (_, count), tokens in zip(prompts, sizes, got, strict=True):
        assert tokens == served.expected(prompt, count)


def test_all_processes_compute_on_the_device(served: ServedCluster) -> None:
    devices = [actor.device for actor in served.status().actors]
    for model in (RANDOM, TINY):
        stats = serve.get_deployment_handle(f"Router-{model}", APP).stats.remote()
        devices.append(stats.result(timeout_s=BACK_S)["device"])
    assert len(devices) == 5
    assert {device.partition(":")[0] for device in devices} == {"privateuseone"}
    assert all(device[-1].isdecimal() for device in devices[:3])  # which of a node's it is


def test_streams_survive_a_killed_actor(served: ServedCluster) -> None:
    told, before = served.status(), served.actors()
    streams = start_streams(served)
    kill(told, before["expert-1"].pid)
    assert not any(stream.ended for stream in streams)
    assert [stream.result(BACK_S) for stream in streams] == expected_tokens(served)
    served.wait_whole()


def test_streams_go_on_when_the_routers_are_killed(served: ServedCluster) -> None:
    expected, told = expected_tokens(served), served.status()
    with Client(served.grpc_address) as client:
        streams = [StreamReader(client, p, greedy(LENGTH), RANDOM, BACK_S) for p in PROMPTS]
        for stream in streams:
            stream.wait_tokens(BEFORE)
        kill(told, *(router.pid for router in told.routers))
        assert not any(stream.ended for stream in streams)
        assert [stream.result(BACK_S) for stream in streams] == expected
    served.wait_whole(BACK_S)


@contextmanager
def deployed(
    served: ServedCluster,
    name: str,
    args: dict[str, Any],
    controller_class: type[ControllerDeployment] = ControllerDeployment,
) -> Iterator[str]:
    """Serve another application on the devices; gives its URL."""
    share = {"num_gpus": DEVICE_SHARE}
    http_port, grpc_port = free_ports(2)
    whole = with_ports({**args, "experts": {"actors": 1, **share}}, http_port, grpc_port)
    whole["router"] = {**args.get("router", {}), **share}
    serve.run(application(whole, controller_class), name=name, route_prefix=None)
    try:
        yield f"http://127.0.0.1:{http_port}"
    finally:
        serve.delete(name)


def completion(url: str, model: str, prompt: list[int]) -> tuple[int, ...]:
    """Return greedy tokens; raises for a status that is no success."""
    body = {
        **{"model": model, "prompt": prompt, "max_tokens": COUNT, "temperature": 0},
        **{"ignore_eos": True, "return_token_ids": True},
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=BACK_S)
    answer.raise_for_status()
    return tuple(answer.json()["choices"][0]["token_ids"])


def hosts_tokens(folder: Path, prompt: list[int], **options: Any) -> tuple[int, ...]:
    """Return the tokens of an engine on the host."""
    cluster = LocalCluster(folder, **options)
    try:
        [events] = cluster.generate(greedy_request("r", prompt, COUNT))
        return events[0].token_ids
    finally:
        cluster.close()


def is_ready(url: str) -> bool:
    return httpx.get(f"{url}/ready").status_code == 200


def test_every_family_has_the_hosts_tokens(served: ServedCluster, tmp_path: Path) -> None:
    for family, save in FAMILIES.items():
        save(tmp_path / family)
        save_tokenizer(tmp_path / family)
    models = [{"id": family, "path": str(tmp_path / family)} for family in FAMILIES]
    assert len(models) >= 10
    args = {"models": models, "router": {"max_batch_size": 8, "max_batch_tokens": 16}}
    with deployed(served, "families", args) as url:
        wait_until(lambda: is_ready(url), "all families are served", BACK_S)
        for family in FAMILIES:
            prompt = prompt_of(40, 7)  # prefilled in three chunks
            assert completion(url, family, prompt) == hosts_tokens(tmp_path / family, prompt), (
                family
            )


def test_experts_at_their_capacity_pass_tokens_on_as_on_the_host(
    served: ServedCluster, tmp_path: Path
) -> None:
    save_mixtral(tmp_path)
    capacity = {"tokens": 4}
    args = {
        "models": [{"id": "m", "path": str(tmp_path)}],
        "router": {"expert_capacity": capacity},
    }
    prompt = prompt_of(40, 7)
    with deployed(served, "capacity", args) as url:
        wait_until(lambda: is_ready(url), "the model is served", BACK_S)
        limited = completion(url, "m", prompt)
        # A router reports its counters by and by.
        wait_until(lambda: overflow_of(url) > 0, "the overflow is counted", BACK_S)
    assert limited == hosts_tokens(tmp_path, prompt, capacity=CapacityConfig(**capacity))


class FragileActor(RemoteExpertActor):
    """An actor whose device is in error while there is the file of its application."""

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        super().__init__(spec, actor_id, generation, epoch)
        compute, file = Block.compute, file_of(spec.app)

        def computed(*args: Any, **options: Any) -> Any:
            works()
            return compute(*args, **options)

        def works() -> None:
            if file.exists():
                raise torch.AcceleratorError("uncorrectable ECC error\nSome advice")

        Block.compute = computed  # type: ignore[method-assign]
        torch.accelerator.synchronize = works  # type: ignore[assignment]


class FragileController(ControllerDeployment):
    """A controller of such actors."""

    actor_class: ClassVar[type] = FragileActor


def file_of(app: str) -> Path:
    """Return the file that breaks an application's devices."""
    return Path(tempfile.gettempdir()) / f"{app}-broken"


def test_status_says_with_which_error_of_its_device_an_actor_ended(
    served: ServedCluster, tmp_path: Path
) -> None:
    save_mixtral(tmp_path)
    app, prompt = f"fragile-{uuid.uuid4().hex}", prompt_of(5, 7)
    args = {"models": [{"id": "m", "path": str(tmp_path)}]}
    with deployed(served, app, args, FragileController) as url, ThreadPoolExecutor(1) as pool:
        wait_until(lambda: is_ready(url), "the model is served", BACK_S)
        controller = serve.get_deployment_handle("Controller", app)

        def reasons() -> list[str]:
            status: ClusterStatus = controller.status.remote().result(timeout_s=BACK_S)
            return [failing.reason for failing in status.failing]

        assert reasons() == []
        file_of(app).touch()
        try:
            answer = pool.submit(completion, url, "m", prompt)
            wait_until(lambda: bool(reasons()), "status knows of the error", BACK_S)
            assert reasons() == ["its device failed (uncorrectable ECC error)"]
        finally:
            file_of(app).unlink()
        assert answer.result(BACK_S) == hosts_tokens(tmp_path, prompt)


def overflow_of(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if "overflow" in line and line[0] != "#"
    )

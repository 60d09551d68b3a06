"""``expertmesh`` as a user runs it, and what its status tells of the processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.shipped import free_ports
from router.client import Message, Sampling
from tests.cluster_fixture import (
    LAYERS,
    NUM_ACTORS,
    NUM_EXPERTS,
    RANDOM,
    TINY,
    ServedCluster,
    greedy,
    is_alive,
    wait_until,
)

MB = 1_000_000
SHORT = Sampling(max_tokens=8, temperature=0.0)
RSS_OF_LIBRARIES = """
import psutil, router.model.lean_transformers
print(psutil.Process().memory_info().rss)
"""
COMMAND = str(Path(sysconfig.get_path("scripts")) / "expertmesh")


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [COMMAND, *words], input=stdin, capture_output=True, text=True, timeout=300
    )


def status_json(served: ServedCluster) -> dict[str, Any]:
    """Return what ``expertmesh status --json`` prints."""
    done = run("status", "--json", "--address", served.grpc_address)
    assert (done.returncode, done.stderr) == (0, "")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_status_tells_every_part_and_every_expert_once(served: ServedCluster) -> None:
    told = status_json(served)
    assert told["models"] == [TINY, RANDOM]
    assert told["placement_version"] >= NUM_ACTORS
    assert told["missing_experts"] == 0
    assert len(told["routers"]) == 2
    assert len(told["gateways"]) == 1
    members = [*told["routers"], *told["gateways"]]
    pids = [told["controller_pid"], *(part["pid"] for part in [*members, *told["actors"]])]
    assert all(is_alive(pid) for pid in pids)
    assert len(set(pids)) == len(pids)
    assert len({part["node"] for part in [*members, *told["actors"]]}) == 1
    actors = told["actors"]
    assert [actor["actor_id"] for actor in actors] == [f"expert-{i}" for i in range(NUM_ACTORS)]
    assert [actor["generation"] for actor in actors] == [1] * NUM_ACTORS
    assert [actor["device"] for actor in actors] == ["cpu"] * NUM_ACTORS
    assert all(actor["tokens"] >= 0 for actor in actors)
    held = sorted(tuple(expert) for actor in actors for expert in actor["experts"])
    assert held == sorted(
        (model, layer, expert)
        for model, layers in LAYERS.items()
        for layer in range(layers)
        for expert in range(NUM_EXPERTS)
    )


def test_status_tells_the_kernel_classes_of_actors_and_routers(served: ServedCluster) -> None:
    told = wait_until(
        lambda: [s for s in [status_json(served)] if all(k["routers"] for k in s["kernels"])],
        "routers have told their class",
        10,
    )[0]
    assert [kernels["model"] for kernels in told["kernels"]] == [TINY, RANDOM]
    for kernels in told["kernels"]:  # all processes are on one machine
        assert [count["processes"] for count in kernels["actors"]] == [NUM_ACTORS]
        assert [count["processes"] for count in kernels["routers"]] == [1]
        assert kernels["mixed"] == ""
        own = {"model": kernels["model"], "kernel_class": kernels["actors"][0]["kernel_class"]}
        assert all(own in actor["kernels"] for actor in told["actors"])
    classes = [kernel["kernel_class"] for one in told["routers"] for kernel in one["kernels"]]
    # The dense part and the experts of a model of Llama's shape are of one class, whatever it is.
    assert sorted(classes) == sorted(k["actors"][0]["kernel_class"] for k in told["kernels"])


def test_routers_have_torch_and_gateways_and_actors_do_without(served: ServedCluster) -> None:
    told = status_json(served)

    def has_torch(pid: int) -> bool:
        maps = psutil.Process(pid).memory_maps()
        return any("libtorch" in one.path for one in maps)

    assert all(has_torch(part["pid"]) for part in told["routers"])
    assert not any(has_torch(part["pid"]) for part in told["gateways"])
    # Where no kernel takes the experts, torch computes them, and the class says so.
    for actor in told["actors"]:
        classes = [kernel["kernel_class"] for kernel in actor["kernels"]]
        assert has_torch(actor["pid"]) == any("torch" in own for own in classes)


def test_only_routers_and_actors_interrupt_other_processes_when_they_wake(
    served: ServedCluster,
) -> None:
    told = status_json(served)

    def policies(pid: int) -> set[int]:
        threads = [thread.id for thread in psutil.Process(pid).threads()]
        return {os.sched_getscheduler(thread_id) for thread_id in threads}

    gateways = [part["pid"] for part in told["gateways"]]
    for pid in (*gateways, told["controller_pid"]):
        assert policies(pid) == {os.SCHED_BATCH}
    for part in (*told["routers"], *told["actors"]):
        assert policies(part["pid"]) == {os.SCHED_OTHER}


def test_status_is_a_table_for_people(served: ServedCluster) -> None:
    done = run("status", "--address", served.grpc_address)
    assert done.returncode == 0
    assert "ready" in done.stdout
    for actor in served.status().actors:
        assert actor.actor_id in done.stdout
        assert str(actor.pid) in done.stdout


def test_generate_prints_the_text_whole_or_as_it_comes(served: ServedCluster) -> None:
    [reply] = served.client.generate("In the beginning", greedy(12), model=TINY)
    words = ("generate", "In the beginning", "--max-tokens", "12", "--temperature", "0")
    address = ("--address", served.grpc_address)
    whole = run(*words, *address)
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, reply.text + "\n", "")
    streamed = run(*words, "--stream", *address)
    assert (streamed.returncode, streamed.stdout) == (0, reply.text + "\n")


def test_generate_prints_json(served: ServedCluster) -> None:
    [reply] = served.client.generate("In the beginning", greedy(9), model=TINY)
    words = ("generate", "In the beginning", "--max-tokens", "9", "--temperature", "0", "--json")
    address = ("--address", served.grpc_address)
    told = json.loads(run(*words, *address).stdout)
    assert (told["text"], tuple(told["token_ids"])) == (reply.text, reply.token_ids)
    lines = run(*words, "--stream", *address).stdout.splitlines()
    assert len(lines) > 1
    assert "".join(json.loads(line)["text"] for line in lines) == reply.text


def test_a_chat_in_a_pipe_is_the_conversation_that_the_client_has(served: ServedCluster) -> None:
    said = [Message("user", "Who made the heaven?")]
    [first] = served.client.generate(messages=said, sampling=SHORT, model=TINY)
    said += [Message("assistant", first.text.strip()), Message("user", "And the earth?")]
    [second] = served.client.generate(messages=said, sampling=SHORT, model=TINY)
    words = ("chat", "--temperature", "0", "--max-tokens", "8", "--address", served.grpc_address)
    done = run(*words, stdin="Who made the heaven?\nAnd the earth?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{first.text.lstrip()}\n{second.text.lstrip()}\n"


@pytest.mark.parametrize("form", [[], ["--no-stream"]])
def test_bench_counts_every_token(served: ServedCluster, form: list[str]) -> None:
    words = ("--requests", "12", "--max-tokens", "7", "--model", RANDOM, "--json", *form)
    done = run("bench", "--address", served.grpc_address, *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    told = json.loads(done.stdout)
    assert (told["succeeded"], told["failed"], told["output_tokens"]) == (12, 0, 84)
    assert 0 < told["request_ms"]["p50"] <= told["request_ms"]["p99"] < 1000 * told["elapsed_s"]


def test_exit_codes_tell_refused_from_unreachable(served: ServedCluster) -> None:
    refused = run("generate", "x", "--model", "nope", "--address", served.grpc_address)
    assert refused.returncode == 1
    assert "nope" in refused.stderr
    usage = run("generate", "x", "--no-such-option", "--address", served.grpc_address)
    assert usage.returncode == 2
    [nobody] = free_ports(1)
    for words in (("status",), ("generate", "x")):
        unreachable = run(*words, "--address", f"127.0.0.1:{nobody}")
        assert unreachable.returncode == 3
        assert len(unreachable.stderr.splitlines()) == 1


def test_processes_stay_small_beside_their_weights(served: ServedCluster) -> None:
    expert_bytes = {
        TINY: 3 * 128 * 128 * 4,  # three matrices of hidden x intermediate in fp32
        RANDOM: 3 * 64 * 96 * 4,
    }
    told = served.status()
    for actor in told.actors:
        weights = sum(expert_bytes[model] for model, _, _ in actor.experts)
        beyond = psutil.Process(actor.pid).memory_info().rss - weights
        assert beyond <= 200 * MB, f"{actor.actor_id}: {beyond / MB:.0f} MB"
    # torch alone takes 0.5 GB more where its build has CUDA.
    libraries = int(subprocess.check_output([sys.executable, "-c", RSS_OF_LIBRARIES], timeout=300))
    for router in told.routers:
        # Of them 20 for the vocabulary of grammars, once one was asked for, and 30 for pages of the
        # cache: since sequences share them, all of them come into use.
        beyond = psutil.Process(router.pid).memory_info().rss - libraries
        assert beyond <= 260 * MB, f"router: {beyond / MB:.0f} MB"

"""A router on an emulated device: the host's tokens, and one copy each way a layer and a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.device import CPU
from cluster.errors import UnavailableError
from router.config import CapacityConfig
from router.engine.scheduler import Limits
from router.messages.request import GenerationRequest, TokenEvent
from tests.checkpoints import save_mixtral
from tests.emulated_copies import Copies
from tests.emulated_device import EmulatedDevice, emulated_device
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok
from tests.local_cluster import LocalCluster, greedy_request

PROMPTS = [[5, 9, 7], [8, 2, 6, 3, 4], list(range(3, 40))]
LIMITS = Limits(32, 16, 256)
"""So few tokens a step that the last prompt is prefilled in chunks beside the decodes."""
ALL: dict[str, Callable[[Path], Any]] = {
    "mixtral": save_mixtral,
    "grok": save_grok,
    **SAVERS,
}


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated_device() as device:
        yield device


def tokens_of(cluster: LocalCluster, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    try:
        return [events[0].token_ids for events in cluster.generate(*requests)]
    finally:
        cluster.close()


def requests(**options: Any) -> list[GenerationRequest]:
    return [greedy_request(f"r{i}", prompt, 6, **options) for i, prompt in enumerate(PROMPTS)]


class Steps:
    """The copies of each step of an engine."""

    def __init__(self, cluster: LocalCluster, device: EmulatedDevice) -> None:
        self.copies: list[Copies] = []
        step = cluster.engine.step

        def counted(*args: Any) -> None:
            with device.counted() as copies:
                step(*args)
            self.copies.append(copies)

        cluster.engine.step = counted  # type: ignore[method-assign]


def check(folder: Path, device: EmulatedDevice, dtype: str | None = None, **options: Any) -> Steps:
    """Compare the tokens with those of the host, and return the copies."""
    expected = tokens_of(LocalCluster(folder, limits=LIMITS, dtype=dtype, **options), *requests())
    cluster = LocalCluster(folder, limits=LIMITS, dtype=dtype, device=device.device, **options)
    steps = Steps(cluster, device)
    assert tokens_of(cluster, *requests()) == expected
    for copies in steps.copies:
        assert not copies.host_reads
        assert not copies.mixed
    return steps


@pytest.mark.parametrize("family", ALL)
def test_each_family_has_the_hosts_tokens_and_a_copy_each_way_a_layer_and_a_step(
    tmp_path: Path, device: EmulatedDevice, family: str
) -> None:
    folder = tmp_path / family
    ALL[family](folder)
    steps = check(folder, device, "float32")
    cluster = LocalCluster(folder, threaded=False)
    num_layers = len(cluster.checkpoint.shape.layers)
    assert len(steps.copies) > 6
    for copies in steps.copies:
        assert len(copies.to_host) == len(copies.to_device) == num_layers + 1


def test_a_chunk_alone_that_ends_no_prompt_is_computed(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    save_mixtral(tmp_path / "m")
    alone, tokens = greedy_request("r", list(range(3, 40)), 3), []
    for where in (torch.device("cpu"), device.device):
        cluster = LocalCluster(tmp_path / "m", limits=LIMITS, device=where)
        tokens.append(tokens_of(cluster, alone))
    assert tokens[0] == tokens[1]


def test_bfloat16_has_the_same_copies(tmp_path: Path, device: EmulatedDevice) -> None:
    save_mixtral(tmp_path / "m")
    cluster = LocalCluster(tmp_path / "m", dtype="bfloat16", device=device.device)
    steps = Steps(cluster, device)
    assert [len(tokens) for tokens in tokens_of(cluster, *requests())] == [6] * 3
    for copies in steps.copies:
        assert len(copies.to_host) == len(copies.to_device) == 4
        assert not copies.host_reads
        assert not copies.mixed


def test_sampled_tokens_and_log_probabilities_are_the_hosts(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    save_mixtral(tmp_path / "m")
    options = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "logprobs": 3}

    def events(cluster: LocalCluster) -> list[TokenEvent]:
        asked = requests(**options, seed=7, n=2)
        try:
            return [event for got in cluster.generate(*asked) for event in got]
        finally:
            cluster.close()

    both = [events(LocalCluster(tmp_path / "m", device=where)) for where in (CPU, device.device)]
    for ours, expected in zip(*both, strict=True):
        assert ours.token_ids == expected.token_ids
        for one, other in zip(ours.logprobs, expected.logprobs, strict=True):
            assert one.top_ids == other.top_ids
            # Keys are gathered in another layout, so sums may have another order.
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-5)


def test_an_expert_at_its_capacity_passes_tokens_on_as_on_the_host(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    save_mixtral(tmp_path / "m")
    tokens = []
    for where in (torch.device("cpu"), device.device):
        cluster = LocalCluster(tmp_path / "m", device=where, capacity=CapacityConfig(tokens=4))
        tokens.append(tokens_of(cluster, greedy_request("r", list(range(3, 40)), 4)))
        assert sum(cluster.overflow.values()) > 0
    assert tokens[0] == tokens[1]


def test_without_an_expert_the_gate_chooses_anew_as_on_the_host(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    save_mixtral(tmp_path / "m")
    tokens = []
    for where in (torch.device("cpu"), device.device):
        cluster = LocalCluster(tmp_path / "m", device=where)
        cluster.lose([(0, 1), (2, 3), (2, 5)])
        tokens.append(tokens_of(cluster, *requests(on_expert_loss="next_expert")))
    assert tokens[0] == tokens[1]


def test_a_device_without_memory_for_weights_and_cache_is_told_before_they_are_moved(
    tmp_path: Path,
) -> None:
    save_mixtral(tmp_path / "m")
    with emulated_device(memory_bytes=1 << 20) as small:
        with pytest.raises(UnavailableError, match=r"lacks [\d,]+ bytes of the [\d,]+") as caught:
            LocalCluster(tmp_path / "m", device=small.device)
        assert caught.value.field == "args.router.cache_tokens"
        with small.counted() as copies:
            pass
        assert torch.accelerator.memory_allocated() == 0
        assert not copies.to_device

"""A router on an emulated device: the host's tokens, and one copy each way a layer and a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import staging as staging_module
from cluster.staging import Staging
from router.config.capacity import CapacityConfig
from router.engine.batch import sampling_of
from router.engine.sampling import Draw, SamplingTensors, _whole_weights, read, sample
from router.engine.scheduling.scheduler import Limits
from router.messages.request import GenerationRequest, Received, SamplingParams, TokenEvent
from router.moe import device_rows
from tests.checkpoints import save_mixtral
from tests.emulated_device import EmulatedDevice
from tests.emulated_steps import Steps
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok
from tests.local_cluster import LocalCluster, greedy_request

PROMPTS = [[5, 9, 7], [8, 2, 6, 3, 4], list(range(3, 40))]
LIMITS = Limits(32, 16, 256)
"""So few tokens a step that the last prompt is prefilled in chunks beside the decodes."""
ALL: dict[str, Callable[[Path], Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}


def events_of(cluster: LocalCluster, requests: Iterable[GenerationRequest]) -> list[TokenEvent]:
    try:
        return [event for got in cluster.generate(*requests) for event in got]
    finally:
        cluster.close()


def tokens_of(cluster: LocalCluster, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    return [event.token_ids for event in events_of(cluster, requests)]


def requests(**options: Any) -> list[GenerationRequest]:
    return [greedy_request(f"r{i}", prompt, 6, **options) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("family", ALL)
def test_each_family_has_the_hosts_tokens_and_a_copy_each_way_a_layer_and_a_step(
    tmp_path: Path, device: EmulatedDevice, family: str
) -> None:
    ALL[family](tmp_path)
    expected = tokens_of(LocalCluster(tmp_path, limits=LIMITS, dtype="float32"), *requests())
    cluster = LocalCluster(tmp_path, limits=LIMITS, dtype="float32", device=device.device)
    steps = Steps(cluster, device)
    assert tokens_of(cluster, *requests()) == expected
    assert len(steps.copies) > 6
    steps.have_one_copy_each_way_a_layer(len(cluster.checkpoint.shape.layers))
    for copies in steps.copies:
        # The last copy brings ids and largest logits, each at a multiple of 64 bytes.
        assert copies.to_host[-1].num_bytes <= 64 + 4 * len(PROMPTS)


def test_a_resumed_request_goes_on_with_the_hosts_tokens(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    """Its prompt and the tokens that its client has are computed first, in chunks."""
    count = 3
    save_mixtral(tmp_path / "m")
    request = greedy_request("r", list(range(3, 40)), 8)
    [whole] = tokens_of(LocalCluster(tmp_path / "m", limits=LIMITS), request)
    cluster = LocalCluster(tmp_path / "m", limits=LIMITS, device=device.device)
    steps = Steps(cluster, device)
    [rest] = tokens_of(cluster, replace(request, received=(Received(whole[:count]),)))
    assert rest == whole[count:]
    assert cluster.engine.replayed == {"equal": count}
    steps.have_one_copy_each_way_a_layer(3)


def test_no_layer_pins_memory_that_was_not_reserved(
    tmp_path: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill chunks of all tokens of a step, and a choice that may be changed."""
    save_mixtral(tmp_path / "m")
    reserved = staging_module._Buffer.bytes_of
    larger: list[int] = []

    def noted(buffer: Any, num_bytes: int) -> torch.Tensor:
        if len(buffer._memory) < num_bytes:
            larger.append(num_bytes)
        return reserved(buffer, num_bytes)

    for permuted_bytes in (device_rows.PERMUTED_BYTES, 0):
        monkeypatch.setattr(device_rows, "PERMUTED_BYTES", permuted_bytes)
        limits, capacity = Limits(4, 512, 4096), CapacityConfig(tokens=100)
        cluster = LocalCluster(
            tmp_path / "m", limits=limits, device=device.device, capacity=capacity, dtype="bfloat16"
        )
        cluster.model.reserve(512)
        with monkeypatch.context() as patch:
            patch.setattr(staging_module._Buffer, "bytes_of", noted)
            long = [3 + (7 * i) % 50 for i in range(700)]
            assert len(tokens_of(cluster, greedy_request("r", long, 2))[0]) == 2
        assert not larger
        assert sum(cluster.overflow.values()) > 0


def test_bfloat16_has_the_same_copies(tmp_path: Path, device: EmulatedDevice) -> None:
    save_mixtral(tmp_path / "m")
    cluster = LocalCluster(tmp_path / "m", dtype="bfloat16", device=device.device)
    steps = Steps(cluster, device)
    assert [len(tokens) for tokens in tokens_of(cluster, *requests())] == [6] * 3
    steps.have_one_copy_each_way_a_layer(3)


def test_rows_of_all_kinds_are_sampled_as_on_the_host_by_a_copy_each_way(
    device: EmulatedDevice,
) -> None:
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    logits[3, 5] = float("nan")
    logits[4, 6] = float("inf")
    logits[5] = -float("inf")
    logits[6] = 2.0
    params = [
        SamplingParams(1, 0.0),
        SamplingParams(1, 0.9, seed=4, logprobs=2),
        SamplingParams(1, 0.0, logprobs=5),
        SamplingParams(1, 1.0, logprobs=2),
        SamplingParams(1, 0.0, logprobs=0),
        SamplingParams(1, 1.3, top_k=3),
        SamplingParams(1, 0.0),
        SamplingParams(1, 0.7, top_k=40, top_p=0.9, min_p=0.02, seed=5, logprobs=0),
        SamplingParams(1, 1.0, seed=6, logprobs=300),
    ]
    made = sampling_of([Draw(p, 0, i) for i, p in enumerate(params)])
    expected = read(sample(logits, made.tensors, made.logprob_sizes), made)
    staging, there = Staging(device.device), logits.to(device.device)
    with device.counted() as copies:
        tensors = SamplingTensors(*staging.to_device(*made.tensors))
        found = read(staging.to_host(*sample(there, tensors, made.logprob_sizes)), made)
    assert found == expected
    assert [i for i, token_id in enumerate(found.token_ids) if token_id is None] == [3, 4, 5]
    assert found.token_ids[6] == 0
    assert (len(copies.to_device), len(copies.to_host)) == (1, 1)


@pytest.fixture
def operations(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> Callable[[SamplingParams], list[tuple[str, torch.dtype]]]:
    """Samples three rows; returns the device's operations and the dtypes of their first tensors."""

    def sampled(params: SamplingParams) -> list[tuple[str, torch.dtype]]:
        made = sampling_of([Draw(params, 0, i) for i in range(3)])
        logits = torch.randn(3, 20).to(device.device)
        tensors = SamplingTensors(*(t.to(device.device) for t in made.tensors))
        compute, found = device.compute, []

        def noted(func: Any, args: Any, kwargs: Any) -> Any:
            if args and isinstance(args[0], torch.Tensor):
                found.append((func.name(), args[0].dtype))
            return compute(func, args, kwargs)

        monkeypatch.setattr(device, "compute", noted)
        sample(logits, tensors, made.logprob_sizes)
        return found

    return sampled


def test_greedy_rows_sort_nothing(operations: Any) -> None:
    names = [name for name, _ in operations(SamplingParams(1, 0.0))]
    assert names == ["aten::argmax", "aten::gather"]


def test_a_device_adds_integers_to_draw_whatever_the_order(operations: Any) -> None:
    found = operations(SamplingParams(1, 1.0, top_p=0.9))
    kinds = ("aten::cumsum", "aten::sum", "aten::_softmax", "aten::logsumexp")
    sums = [dtype for name, dtype in found if name.startswith(kinds)]
    assert len(sums) >= 4
    assert {*sums} <= {torch.int64, torch.bool}


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 300_000])
def test_whole_weights_are_probabilities_whose_sum_is_exact(vocab: int) -> None:
    scaled = torch.randn(2, vocab, generator=torch.Generator().manual_seed(vocab)).double()
    scaled[1] = 0
    scaled -= scaled.amax(dim=1, keepdim=True)
    weights = _whole_weights(scaled)
    total = weights.sum(dim=1, keepdim=True)
    assert int(total[1]) == vocab * int(weights[1, 0]) > 1 << 60
    assert [int(x) for x in total] == [sum(row) for row in weights.tolist()]
    assert torch.allclose(weights.double() / total, scaled.softmax(dim=1), rtol=0, atol=1e-12)


def test_log_probabilities_of_prompts_are_those_of_the_host_and_need_no_other_copy(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    save_mixtral(tmp_path)
    asked = requests(prompt_logprobs=3, logprobs=1)
    expected = events_of(LocalCluster(tmp_path, limits=LIMITS), asked)
    cluster = LocalCluster(tmp_path, limits=LIMITS, device=device.device)
    steps = Steps(cluster, device)
    found = events_of(cluster, asked)
    steps.have_one_copy_each_way_a_layer(3)
    for own, other in zip(expected, found, strict=True):
        assert other.token_ids == own.token_ids
        assert len(other.prompt_logprobs) == len(own.prompt_logprobs)
        for row, same in zip(own.prompt_logprobs, other.prompt_logprobs, strict=True):
            assert same.logprob == pytest.approx(row.logprob, abs=1e-4)
            assert same.top_logprobs == pytest.approx(row.top_logprobs, abs=1e-4)

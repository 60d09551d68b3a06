"""Rows that a device permutes: those that the host gathers, in one copy and in few pieces."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from cluster.staging import Staging
from cluster.transport.base import Call, CallFailure
from experts.families.base import GateSpec
from router.config.capacity import CapacityConfig
from router.engine.scheduling.scheduler import Limits
from router.moe import device_rows
from router.moe.device_rows import PermutedRows, chosen_rows, permute
from router.moe.gate import Gate
from router.moe.permute import gather, lay_out, rows_of_parts, split
from tests.emulated_device import EmulatedDevice
from tests.emulated_steps import Steps
from tests.local_cluster import BankTransport, LocalCluster, greedy_request

PROMPTS = [[5, 9, 7], [8, 2, 6, 3, 4], list(range(3, 40))]
LIMITS = Limits(32, 16, 256)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rows permuted however few they are."""
    monkeypatch.setattr(device_rows, "PERMUTED_BYTES", 0)


def chosen(num_tokens: int, k: int, num_experts: int, seed: int) -> torch.Tensor:
    """Return ids [T, K] that differ within a token."""
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k).indices


@settings(max_examples=60)
@given(
    num_tokens=st.integers(1, 30),
    k=st.integers(1, 4),
    num_actors=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_parts_have_the_bytes_that_the_host_gathers(
    num_tokens: int, k: int, num_actors: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    num_experts = 6
    ids = chosen(num_tokens, k, num_experts, seed)
    rows = torch.randn(num_tokens, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    permuted, pairs = permute(rows, ids)
    moved = PermutedRows(permuted, pairs.numpy(), k)
    assert moved.shape == rows.shape
    assert (moved.like.shape, moved.like.dtype, moved.dtype) == (rows.shape, dtype, dtype)

    actors = [f"a{data.draw(st.integers(0, num_actors - 1))}" for _ in range(num_experts)]
    layout = lay_out(dict(enumerate(actors)), dict.fromkeys(actors, 1))
    some = data.draw(st.sets(st.integers(0, num_tokens * k - 1), min_size=1))
    other_ids = chosen(num_tokens, k, num_experts, seed + 1)
    for expert_ids, asked in (
        (ids, None),
        (ids, np.array(sorted(some), np.int64)),
        (other_ids, None),  # of a choice that was changed on the host
    ):
        ordered, parts, _ = split(layout, expert_ids.numpy().ravel(), k, asked)
        found = rows_of_parts(moved, ordered, parts, k)
        assert [b"".join(pieces) for pieces in found] == [
            b"".join(pieces) for pieces in rows_of_parts(rows, ordered, parts, k)
        ]
        assert b"".join(itertools.chain(*found)) == bytes(gather(rows, ordered, k))
        if expert_ids is ids and asked is None:
            has_gaps = len(ids.unique()) < num_experts
            for part, pieces in zip(parts, found, strict=True):
                runs = 1 + sum(b > a + 1 for a, b in itertools.pairwise(part.expert_ids))
                assert len(pieces) == runs or (has_gaps and len(pieces) < runs)


def given_gate(*choice: torch.Tensor) -> Any:
    return SimpleNamespace(logits=lambda rows: rows, choose_by=lambda *_: choice)


@pytest.mark.usefixtures("always")
def test_a_frame_is_sent_in_the_pieces_of_its_rows(device: EmulatedDevice) -> None:
    """From the memory into which the device has copied, without a copy of the host's own."""
    ids = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 2]])
    there = [t.to(device.device) for t in (ids, torch.ones(4, 2), torch.randn(4, 8))]
    with device.counted() as copies:
        gate = given_gate(*there[:2])
        found, moved, _ = chosen_rows(Staging(device.device), gate, there[2], False)
    assert len(copies.to_host) == 1
    assert found.ids.tolist() == ids.tolist()
    assert isinstance(moved, PermutedRows)
    layout = lay_out({0: "a", 1: "b", 2: "a"}, {"a": 1, "b": 1})
    ordered, parts, _ = split(layout, ids.numpy().ravel(), 2, None)
    [of_a, of_b] = rows_of_parts(moved, ordered, parts, 2)
    assert [len(of_a), len(of_b)] == [2, 1]
    begin, end = moved.like.data_ptr(), moved.like.data_ptr() + 8 * 8 * 4
    for piece in (*of_a, *of_b):
        at = np.frombuffer(piece, np.uint8).__array_interface__["data"][0]
        assert begin <= at < end


def test_few_rows_come_in_the_tokens_order(device: EmulatedDevice) -> None:
    rows = torch.randn(4, 8)
    ids = chosen(4, 2, 4, 0)
    there = [t.to(device.device) for t in (ids, torch.ones(4, 2), rows)]
    with device.counted() as copies:
        gate = given_gate(*there[:2])
        found, moved, _ = chosen_rows(Staging(device.device), gate, there[2], False)
    assert torch.equal(moved, rows)  # type: ignore[arg-type]
    assert (found.ids.tolist(), found.weights.tolist()) == (ids.tolist(), [[1.0, 1.0]] * 4)
    assert len(copies.to_host) == 1
    assert copies.to_host[0].num_bytes == 64 + 64 + rows.nbytes


@pytest.mark.parametrize("permuted_bytes", [0, 1 << 30])
@pytest.mark.parametrize("may_change", [True, False])
def test_a_changed_choice_asks_the_device_for_nothing_that_was_foreseen(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, permuted_bytes: int, may_change: bool
) -> None:
    monkeypatch.setattr(device_rows, "PERMUTED_BYTES", permuted_bytes)
    generator = torch.Generator().manual_seed(4)
    weight, rows = (torch.randn(n, 8, generator=generator) for n in (6, 5))
    correction = torch.rand(6, generator=generator)
    spec = GateSpec(score="sigmoid", renormalises=True)
    host = Gate(spec, 2, partial(functional.linear, weight=weight), correction)
    weight, correction, rows_there = (t.to(device.device) for t in (weight, correction, rows))
    gate = Gate(spec, 2, partial(functional.linear, weight=weight), correction)
    asked, allowed = np.array([0, 3, 4]), np.ones((3, 6), dtype=bool)
    allowed[:, 1] = allowed[1, 2:5] = False
    with device.counted() as copies:
        found, _, reselect = chosen_rows(Staging(device.device), gate, rows_there, may_change)
        anew = [reselect(asked, allowed), reselect(asked[:1], allowed[:1])]
    assert len(copies.to_host) == (1 if may_change else 2)
    assert not copies.to_device
    for got, expected in (
        (found, host.choice(rows)),
        (anew[0], host.choose_anew(rows, asked, allowed)),
        (anew[1], host.choose_anew(rows, asked[:1], allowed[:1])),
    ):
        assert got.ids.tolist() == expected.ids.tolist()
        torch.testing.assert_close(got.weights, expected.weights)


def generated(
    folder: Path, device: torch.device | None, *, lost: bool = False, **options: Any
) -> tuple[list[tuple[int, ...]], LocalCluster]:
    """Return the tokens of all prompts; with ``lost`` of three actors only two have experts."""
    options |= {} if device is None else {"device": device}
    cluster = LocalCluster(folder, 3, limits=LIMITS, dtype="float32", **options)
    if lost:
        cluster.view.publish(cluster.placement.without("a0"))
    policy = {"on_expert_loss": "next_expert"} if lost else {}
    asked = [greedy_request(f"r{i}", prompt, 6, **policy) for i, prompt in enumerate(PROMPTS)]
    try:
        return [events[0].token_ids for events in cluster.generate(*asked)], cluster
    finally:
        cluster.close()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("failure", [None, "died", "not finite"])
@pytest.mark.parametrize(
    "options",
    [{}, {"min_copies": 2}, {"lost": True}, {"capacity": CapacityConfig(tokens=4)}],
    ids=["", "copies", "missing", "capacity"],
)
def test_an_engine_has_the_hosts_tokens(
    folder: Path, device: EmulatedDevice, options: dict[str, Any], failure: str | None
) -> None:
    """Also where a layer's choice changes on the host, and where frames are sent again."""
    expected, _ = generated(folder, None, **options)
    sent, answered = PermutedRows.of, BankTransport._answer
    pieces: list[int] = []

    def noted(self: PermutedRows, pairs: np.ndarray) -> Any:
        found = sent(self, pairs)
        pieces.append(len(found))
        return found

    def fail(self: Any, call: Call) -> Any:
        answer = answered(self, call)
        if failure is None or len(self.frames) % 5:
            return answer
        return CallFailure.DIED if failure == "died" else answer[:-4] + np.float32("nan").tobytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BankTransport, "_answer", fail)
        patch.setattr(PermutedRows, "of", noted)
        found, cluster = generated(folder, device.device, **options)
    assert found == expected
    assert pieces
    assert [*cluster.dispatcher.retries] == ([failure.replace(" ", "_")] if failure else [])
    assert (sum(cluster.overflow.values()) > 0) == ("capacity" in options)


@pytest.mark.usefixtures("always")
def test_an_engine_copies_once_each_way_a_layer(folder: Path, device: EmulatedDevice) -> None:
    cluster = LocalCluster(folder, limits=LIMITS, dtype="float32", device=device.device)
    steps = Steps(cluster, device)
    try:
        cluster.generate(*(greedy_request(f"r{i}", p, 6) for i, p in enumerate(PROMPTS)))
    finally:
        cluster.close()
    steps.have_one_copy_each_way_a_layer(len(cluster.checkpoint.shape.layers))

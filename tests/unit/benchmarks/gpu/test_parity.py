"""The comparison of families with their oracles, on the host and on an emulated device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import parity
from cluster.device import CPU
from experts.families.registry import FAMILIES
from tests.emulated_device import emulated_device
from tests.family_checkpoints import save_olmoe
from tests.local_cluster import LocalCluster

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_family_is_compared() -> None:
    assert parity.FAMILIES.keys() == FAMILIES.keys() - {"grok-1"}  # Grok-1 in another naming


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_family_on_the_host_computes_as_its_oracle_does(family: str) -> None:
    compared = parity.compare(family, CPU)
    assert compared.equal_tokens == compared.tokens == parity.GENERATED * len(parity.PROMPTS)
    assert 0 < compared.distance <= compared.most_distance
    assert compared.is_kept


def test_the_independent_grok_is_compared_too() -> None:
    assert parity.compare("grok", CPU, prompts=[(5, 9, 7)]).is_kept


def test_router_and_experts_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters: list[Any] = []

    class Kept(LocalCluster):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            clusters.append(self)

    monkeypatch.setattr(parity, "LocalCluster", Kept)
    with emulated_device() as device:
        with device.counted() as copies:
            compared = parity.compare("deepseek_v2", device.device, CPU, parity.PROMPTS[:2])
        assert compared.is_kept
        assert (compared.attention, compared.may_read_pages) == ("gathered", False)
        assert len(clusters) == 2  # fp32 and bf16
        for cluster in clusters:
            banks = cluster.transport.banks.values()
            experts = [expert for bank in banks for expert in bank.experts.values()]
            assert {expert.block.device for expert in experts} == {device.device}
        assert copies.to_host
        assert copies.to_device
        assert not copies.host_reads
        assert not copies.mixed


def test_the_attention_of_a_family_is_told() -> None:
    with emulated_device() as device:
        compared = parity.compare("mixtral", device.device, CPU, prompts=[(5, 9, 7)])
    assert (compared.attention, compared.may_read_pages) == ("varlen", True)
    assert parity.compare("mixtral", CPU, prompts=[(5, 9, 7)]).attention == "native"


def test_another_model_is_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(folder: Path, device: torch.device) -> parity.Oracle:
        (folder / "other").mkdir()
        save_olmoe(folder)
        return parity.TransformersOracle(save_olmoe(folder / "other", seed=1), device)

    monkeypatch.setattr(parity, "FAMILIES", {"olmoe": other})
    compared = parity.compare("olmoe", CPU)
    assert compared.equal_tokens < compared.tokens
    assert compared.distance > compared.most_distance
    assert not compared.is_kept

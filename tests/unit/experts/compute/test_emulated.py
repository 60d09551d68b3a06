"""Emulated devices: time without work, answers of zeros that are flagged, one queue a device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from cluster.reports import ActorStatus, ClusterStatus
from cluster.spec import EMULATED, Emulation, ExpertKey
from cluster.wire.frames import RowsFrame, joined
from experts.bank import ExpertBank
from experts.compute.emulated import EmulatedExpert
from router.cli.status import _summary
from router.config.deployment import parse_args
from router.served import check_file, inspect_models, pool_specs
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.experts.frames import dispatch_frame
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

HIDDEN = 64
MODEL = {"id": "a", "path": "models/mesh-tiny"}


def test_a_product_takes_the_batchs_time_and_that_of_its_rows() -> None:
    times_s: list[float] = []
    emulation = Emulation(batch_s=2.0, row_s=0.5)
    expert = EmulatedExpert(emulation, (HIDDEN,), (HIDDEN,), "float32", times_s.append)
    bank = ExpertBank()
    for expert_id in range(3):
        bank.hold(ExpertKey("m", 0, expert_id), expert)
    for counts, expected in (
        ([{1: 6}], [5.0]),
        ([{1: 2}, {1: 4}], [5.0]),  # rows of one expert share a product
        ([{1: 2}, {2: 4}], [3.0, 4.0]),
        ([], []),
    ):
        frames = [dispatch_frame(torch.ones(sum(c.values()), HIDDEN), c) for c in counts]
        answers = bank.compute(frames)
        assert sorted(times_s) == expected
        times_s.clear()
        for frame, answer in zip(frames, answers, strict=True):
            assert isinstance(answer, RowsFrame)
            assert bytes(joined(answer.rows)) == bytes(4 * frame.num_rows * HIDDEN)


def test_tokens_are_those_of_a_model_whose_experts_answer_zeros_and_are_flagged(
    folder: Path, tmp_path: Path
) -> None:
    oracle = save_mixtral(tmp_path)
    with torch.no_grad():
        for layer in oracle.model.layers:
            layer.mlp.experts.down_proj.zero_()
    cluster = LocalCluster(folder, emulation=Emulation(0.0, 1e-6))
    try:
        prompt = prompt_of(20, 3)
        [[event]] = cluster.generate(greedy_request("r", prompt, 8))
    finally:
        cluster.close()
    check_greedy(event.token_ids, oracle, prompt, 8)
    assert not event.exact


TIMES = {"batch_s": 0.002, "row_s": 0.001}


def test_pools_may_be_emulated_or_not_and_the_check_names_them(tmp_path: Path) -> None:
    pools = [{"name": "fast", "actors": 1}, {"name": "slow", "actors": 1, "emulate": TIMES}]
    arguments = {"models": [MODEL], "experts": {"pools": pools}}
    config = parse_args(arguments)
    assert config.experts.emulated_pools == ("slow",)
    real, emulated = pool_specs(config.experts, inspect_models(config))
    assert real.actor.emulation is None
    assert emulated.actor.emulation == Emulation(0.002, 0.001)
    assert replace(emulated.actor, emulation=None).digest == real.actor.digest
    assert emulated.actor.digest != real.actor.digest
    assert parse_args(config.effective()) == config
    application = {"name": "x", "import_path": "router.app:build", "args": arguments}
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"applications": [application]}))
    assert "emulated devices, so that no answer is exact: slow" in check_file(file)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"emulate": {}}, "emulate", "needs batch_s or row_s above 0"),
        ({"emulate": {"batch_s": -1}}, "emulate.batch_s", "given: -1"),
        ({"emulate": {"row_ms": 1}}, "emulate.row_ms", "llowed keys: batch_s, row_s"),
        ({"emulate": TIMES, "num_gpus": 1}, "emulate",
         "an emulated device computes nothing; leave out num_gpus"),
        ({"pools": [{"name": "a", "actors": 1}], "emulate": TIMES}, "emulate",
         "belongs in each pool when pools are listed"),
        ({"pools": [{"name": "a", "actors": 1, "emulate": {"x": 1}}]}, "pools[0].emulate.x",
         "allowed keys: batch_s, row_s"),
    ],
)  # fmt: skip
def test_a_wrong_emulation_is_named_with_its_place(
    changes: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args({"models": [MODEL], "experts": changes})
    assert caught.value.field == f"args.experts.{field}"
    assert words in caught.value.message


@pytest.mark.parametrize(("device", "is_said"), [("cpu", False), (EMULATED, True)])
def test_the_status_says_that_devices_are_emulated(device: str, is_said: bool) -> None:
    actors = (ActorStatus("a-0", 1, "n", device, 1, (("m", 0, 0),), 5),)
    shown = _summary(ClusterStatus(("m",), 1, 2, 3, 0, actors=actors))
    assert ("emulated devices: no answer is the model's" in shown) == is_said

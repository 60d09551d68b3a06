"""Emulated devices: time without work, answers of zeros that are flagged, one queue a device."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from cluster.reports import ActorStatus, ClusterStatus
from cluster.spec import (
    EMULATED,
    ActorReport,
    ActorSpec,
    Emulation,
    ExpertKey,
    ModelExperts,
    ModelSource,
)
from cluster.wire.frames import DispatchFrame, RowsFrame, decode, encode, joined
from experts import actor as actor_module
from experts.actor import ExpertActor
from experts.bank import ExpertBank
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of
from experts.compute.emulated import EmulatedExpert
from router.cli.status import _summary
from router.config.deployment import parse_args
from router.served import check_file, inspect_models, pool_specs
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.experts.frames import dispatch_frame
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

HIDDEN = 64
BATCH_S = 0.05
MODEL = {"id": "a", "path": "models/mesh-tiny"}


def frame_of(layer_id: int, expert_id: int, num_rows: int, request_id: int = 1) -> DispatchFrame:
    rows = torch.ones(num_rows, HIDDEN)
    counts = {expert_id: num_rows}
    return dispatch_frame(rows, counts, request_id=request_id, layer_id=layer_id)


def slept(frames: list[DispatchFrame]) -> tuple[list[float], list[Any]]:
    """Return what a bank of emulated experts sleeps for the frames, and its answers."""
    times_s: list[float] = []
    emulation = Emulation(batch_s=2.0, row_s=0.5)
    expert = EmulatedExpert(emulation, (HIDDEN,), (HIDDEN,), "float32", times_s.append)
    bank = ExpertBank()
    for expert_id in range(3):
        bank.hold(ExpertKey("m", 0, expert_id), expert)
    return times_s, bank.compute(frames)


def test_a_product_takes_the_batchs_time_and_the_rows() -> None:
    times_s, [answer] = slept([frame_of(0, 1, 6)])
    assert times_s == [5.0]
    assert isinstance(answer, RowsFrame)
    assert answer.num_rows == 6
    assert bytes(joined(answer.rows)) == bytes(4 * 6 * HIDDEN)


def test_rows_of_one_expert_share_a_product_and_those_of_others_do_not() -> None:
    assert slept([frame_of(0, 1, 2), frame_of(0, 1, 4)])[0] == [5.0]
    assert sorted(slept([frame_of(0, 1, 2), frame_of(0, 2, 4)])[0]) == [3.0, 4.0]
    assert slept([])[0] == []


class Actor(ExpertActor):
    """The actor, but for what it asks Ray."""

    def _report(self) -> ActorReport:
        raise AssertionError("nobody asks")


def test_batches_on_one_device_take_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_module, "end_when_orphaned", lambda lease, app: None)
    source = ModelSource(
        str(folder),
        "float32",
        ModelExperts("m", (0, 1, 2), 8, 1),
        identity_of(open_checkpoint(folder)),
    )
    actor = Actor(
        ActorSpec("app", (source,), 0.1, 0, 1, 1000, emulation=Emulation(BATCH_S, 0.0)), "e-0", 1, 1
    )
    actor._load(1, [ExpertKey("m", 0, 0), ExpertKey("m", 1, 0)])
    together = threading.Barrier(2)

    def ask(layer_id: int) -> float:
        data = b"".join(encode(frame_of(layer_id, 0, 1, layer_id)))
        together.wait(30)
        assert isinstance(decode(actor.compute(data)), RowsFrame)
        return time.perf_counter()

    with ThreadPoolExecutor(2) as pool:
        started_s = time.perf_counter()
        first_s, last_s = sorted(pool.map(ask, (0, 1)))
    assert first_s - started_s >= BATCH_S
    # Whether they came as one batch or as two, the device worked for both, one after the other.
    assert last_s - started_s >= 2 * BATCH_S


def test_tokens_are_those_of_a_model_whose_experts_answer_zeros_and_are_flagged(
    folder: Path, tmp_path: Path
) -> None:
    oracle = save_mixtral(tmp_path)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter.zero_()
    assert any(name.endswith("experts.down_proj") for name, _ in oracle.named_parameters())
    cluster = LocalCluster(folder, emulation=Emulation(0.0, 1e-6))
    try:
        prompt = prompt_of(20, 3)
        [[event]] = cluster.generate(greedy_request("r", prompt, 8))
    finally:
        cluster.close()
    check_greedy(event.token_ids, oracle, prompt, 8)
    assert not event.exact


def experts(**changes: Any) -> dict[str, Any]:
    return {"models": [MODEL], "experts": changes}


TIMES = {"batch_s": 0.002, "row_s": 0.001}


def test_pools_may_be_emulated_or_not() -> None:
    pools = [{"name": "fast", "actors": 1}, {"name": "slow", "actors": 1, "emulate": TIMES}]
    config = parse_args(experts(pools=pools))
    assert config.experts.emulated_pools == ("slow",)
    real, emulated = pool_specs(config.experts, inspect_models(config))
    assert real.actor.emulation is None
    assert emulated.actor.emulation == Emulation(0.002, 0.001)
    assert replace(emulated.actor, emulation=None).digest == real.actor.digest
    assert emulated.actor.digest != real.actor.digest
    assert parse_args(config.effective()) == config


def test_the_check_names_emulated_pools(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "applications: [{name: x, import_path: 'router.app:build', args: {models: [{id: a, path: "
        "models/mesh-tiny}], experts: {emulate: {batch_s: 0.01}}}}]"
    )
    assert "emulated devices, so that no answer is exact: expert" in check_file(file)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"emulate": {}}, "args.experts.emulate", "needs batch_s or row_s above 0"),
        ({"emulate": {"batch_s": -1}}, "args.experts.emulate.batch_s", "given: -1"),
        ({"emulate": {"row_ms": 1}}, "args.experts.emulate.row_ms", "allowed keys: batch_s, row_s"),
        (
            {"emulate": TIMES, "num_gpus": 1},
            "args.experts.emulate",
            "an emulated device computes nothing; leave out num_gpus",
        ),
        (
            {"pools": [{"name": "a", "actors": 1}], "emulate": TIMES},
            "args.experts.emulate",
            "belongs in each pool when pools are listed",
        ),
        (
            {"pools": [{"name": "a", "actors": 1, "emulate": {"x": 1}}]},
            "args.experts.pools[0].emulate.x",
            "allowed keys: batch_s, row_s",
        ),
    ],
)
def test_a_wrong_emulation_is_named_with_its_place(
    changes: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(experts(**changes))
    assert caught.value.field == field
    assert words in caught.value.message


@pytest.mark.parametrize(("device", "is_said"), [("cpu", False), (EMULATED, True)])
def test_the_status_says_that_devices_are_emulated(device: str, is_said: bool) -> None:
    actors = (ActorStatus("a-0", 1, "n", device, 1, (("m", 0, 0),), 5),)
    shown = _summary(ClusterStatus(("m",), 1, 2, 3, 0, actors=actors))
    assert ("emulated devices: no answer is the model's" in shown) == is_said

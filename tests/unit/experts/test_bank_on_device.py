"""The bank of an actor on an emulated device: the host's rows, and one copy each way a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.errors import ExpertFailedError
from cluster.spec import ExpertKey
from cluster.wire.frames import DispatchFrame, ErrorFrame, RowsFrame, decode, joined
from experts.bank import ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.compute.ffn import ACTIVATIONS
from tests.checkpoints import save_mixtral
from tests.emulated_device import EmulatedDevice, emulated_device
from tests.unit.experts.local_actor import frame_of, rows_of

HOST = torch.device("cpu")


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated_device() as device:
        yield device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder)
    return folder


def bank_on(folder: Path, device: torch.device) -> ExpertBank:
    checkpoint, bank = open_checkpoint(folder), ExpertBank()
    for expert_id in range(4):
        weights = load_expert(checkpoint, 0, expert_id, torch.float32, device)
        bank.hold(ExpertKey("m", 0, expert_id), GatedFfnExpert(weights, ACTIVATIONS["silu"]))
    return bank


def frames_of(*sizes: int) -> list[DispatchFrame]:
    """Frames of so many rows each, for the experts 0, 1, 2 and 3 by turns."""
    frames = []
    for number, size in enumerate(sizes):
        data = frame_of(rows_of(size, seed=number), number + 1, expert_id=number % 4)
        frame = decode(data)
        assert isinstance(frame, DispatchFrame)
        frames.append(frame)
    return frames


def rows_in(answer: RowsFrame | ErrorFrame) -> bytes:
    assert isinstance(answer, RowsFrame)
    return bytes(joined(answer.rows))


@pytest.mark.parametrize("sizes", [(1,), (40,), (3, 5), (1, 2, 3, 4, 5, 6)])
def test_a_batch_of_any_frames_takes_one_copy_each_way_and_has_the_hosts_rows(
    folder: Path, device: EmulatedDevice, sizes: tuple[int, ...]
) -> None:
    frames = frames_of(*sizes)
    expected = [rows_in(answer) for answer in bank_on(folder, HOST).compute(frames)]
    bank = bank_on(folder, device.device)
    for _ in range(2):  # the second uses the buffers again
        with device.counted() as copies:
            answers = bank.compute(frames)
        assert (len(copies.to_device), len(copies.to_host)) == (1, 1)
        assert [rows_in(answer) for answer in answers] == expected


def test_answers_outlast_the_next_batch(folder: Path, device: EmulatedDevice) -> None:
    bank = bank_on(folder, device.device)
    first = bank.compute(frames_of(4))
    kept = [rows_in(answer) for answer in first]
    bank.compute(frames_of(2, 9))
    assert [rows_in(answer) for answer in first] == kept


def test_frames_that_are_refused_or_fail_leave_the_others_their_rows(
    folder: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [rows_in(answer) for answer in bank_on(folder, HOST).compute(frames_of(3, 5, 2))]
    bank = bank_on(folder, device.device)
    product = GatedFfnExpert.__call__

    def failing(expert: GatedFfnExpert, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) == 5:
            raise ExpertFailedError("cannot", "e")
        return product(expert, rows)

    monkeypatch.setattr(GatedFfnExpert, "__call__", failing)
    unknown = frames_of(1)[0]._replace(expert_ids=(7,))
    first, failed, third, refused = bank.compute([*frames_of(3, 5, 2), unknown])
    assert [rows_in(first), rows_in(third)] == [expected[0], expected[2]]
    assert isinstance(failed, ErrorFrame)
    assert failed.kind == "ExpertFailedError"
    assert isinstance(refused, ErrorFrame)
    assert refused.kind == "WrongPlacementError"
    [alone] = bank.compute(frames_of(5))
    assert isinstance(alone, ErrorFrame)

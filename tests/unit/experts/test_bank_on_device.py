"""The bank of an actor on an emulated device: the host's rows, and one copy each way a batch."""

from __future__ import annotations

import gc
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import OverloadedError
from cluster.spec import ExpertKey
from cluster.wire.frames import DispatchFrame, ErrorFrame, RowsFrame, joined
from cluster.wire.tensors import dtype_name, from_bytes
from experts.bank import ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.compute import device_experts
from experts.compute.device_experts import Block, DeviceExpert
from experts.compute.expert_device import ExpertDevice
from tests.emulated_device import EmulatedDevice, emulated_device
from tests.family_checkpoints import SAVERS
from tests.unit.experts.frames import dispatch_frame

HOST = torch.device("cpu")
HIDDEN, LIMIT_S = 64, 60.0
KEYS = [ExpertKey("m", layer_id, expert_id) for layer_id in (0, 1) for expert_id in range(4)]
Counts = Mapping[int, int]
"""The number of rows for each expert."""
BATCHES: dict[str, list[tuple[int, Counts]]] = {
    "one": [(0, {2: 1})],
    "many rows": [(0, {1: 40})],
    "all experts": [(0, {0: 3, 1: 1, 2: 2, 3: 5})],
    "in any order": [(0, {3: 3, 0: 1, 2: 2})],
    "an expert without rows": [(0, {0: 3, 1: 0, 2: 2})],
    "two frames": [(0, {0: 3, 1: 4}), (0, {1: 2, 3: 1})],
    "two layers": [(0, {0: 3, 1: 4}), (1, {1: 2, 3: 1}), (0, {2: 2})],
}


@pytest.fixture(params=[True, False], ids=["grouped", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(device_experts, "choose_grouped_mm", lambda *_: None)


def load(
    bank: ExpertBank, checkpoint: Checkpoint, keys: Collection[ExpertKey], dtype: str = "float32"
) -> None:
    """Load experts as an actor does; on the bank's device, if it has one, without joining them."""
    device, activation = bank._device, checkpoint.shape.activation
    if device is not None:
        device.begin_load(dict.fromkeys(keys, checkpoint.expert_bytes(dtype)))
    for key in keys:
        weights = load_expert(checkpoint, key.layer_id, key.expert_id, dtype)
        if device is None:
            bank.hold(key, GatedFfnExpert(weights, activation, 1))
        else:
            bank.hold(key, device.load(key, weights, activation))
    if device is not None:
        device.end_load()


def bank_on(
    folder: Path, device: torch.device, keys: Collection[ExpertKey] = KEYS, dtype: str = "float32"
) -> ExpertBank:
    bank = ExpertBank(None if device == HOST else ExpertDevice(device, "expert-0", print))
    load(bank, open_checkpoint(folder), keys, dtype)
    return bank


def frames_of(
    batch: Sequence[tuple[int, Counts]], dtype: torch.dtype = torch.float32
) -> list[DispatchFrame]:
    """Frames of layers and numbers of rows."""
    frames = []
    for number, (layer_id, counts) in enumerate(batch):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randn(sum(counts.values()), HIDDEN, generator=generator).to(dtype)
        frames.append(dispatch_frame(rows, counts, request_id=number + 1, layer_id=layer_id))
    return frames


def rows_in(answer: RowsFrame | ErrorFrame) -> torch.Tensor:
    assert isinstance(answer, RowsFrame)
    data = bytearray(joined(answer.rows))
    return from_bytes(data, answer.dtype, answer.num_rows, answer.row_shape)


def check(
    answers: Sequence[RowsFrame | ErrorFrame],
    expected: Sequence[RowsFrame | ErrorFrame],
    tolerance: float = 1e-5,
) -> None:
    for answer, right in zip(answers, expected, strict=True):
        assert answer.request_id == right.request_id
        torch.testing.assert_close(rows_in(answer), rows_in(right), rtol=tolerance, atol=tolerance)


def check_as_host(folder: Path, bank: ExpertBank, batch: Sequence[tuple[int, Counts]]) -> None:
    """Check that a bank answers as one of the same experts on the host."""
    frames = frames_of(batch)
    check(bank.compute(frames), bank_on(folder, HOST, bank.experts).compute(frames))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_takes_one_copy_each_way_and_has_the_hosts_rows(
    folder: Path, device: EmulatedDevice, name: str
) -> None:
    frames = frames_of(BATCHES[name])
    host = bank_on(folder, HOST)
    expected = host.compute(frames)
    bank = bank_on(folder, device.device)
    for _ in range(3):  # the third uses the buffers again
        with device.counted() as copies:
            answers = bank.compute(frames)
        assert (len(copies.to_device), len(copies.to_host)) == (1, 1)
        check(answers, expected)
    assert {key: count / 3 for key, count in bank.tokens.items()} == host.tokens


def test_a_product_has_a_bounded_number_of_rows(
    folder: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More would let torch choose other tiles, with which a row's sums may have another order."""
    frames = frames_of([(0, {0: 3, 1: 14, 3: 6}), (0, {1: 2})])
    expected = bank_on(folder, HOST).compute(frames)
    monkeypatch.setattr(device_experts, "MAX_GROUP_ROWS", 2)
    sizes = []
    product = device_experts.grouped_ffn

    def counted(rows: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(rows))
        return product(rows, *others)

    monkeypatch.setattr(device_experts, "grouped_ffn", counted)
    bank = bank_on(folder, device.device)
    with device.counted() as copies:
        check(bank.compute(frames), expected)
    assert sizes == [8, 8, 8, 1]
    assert (len(copies.to_device), len(copies.to_host)) == (1, 1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [("gpt_oss", torch.float32, 1e-5), ("olmoe", torch.bfloat16, 2e-2)],
)
def test_biases_and_bfloat16_have_the_hosts_rows_up_to_rounding(
    tmp_path: Path, device: EmulatedDevice, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    SAVERS[family](tmp_path)
    frames = frames_of(BATCHES["two frames"], dtype)
    on_device, on_host = (
        bank_on(tmp_path, place, KEYS[:4], dtype_name(dtype)) for place in (device.device, HOST)
    )
    check(on_device.compute(frames), on_host.compute(frames), tolerance)


def test_answers_outlast_the_next_batches(folder: Path, device: EmulatedDevice) -> None:
    bank = bank_on(folder, device.device)
    first = bank.compute(frames_of([(0, {0: 4})]))
    kept = [rows_in(answer) for answer in first]
    for _ in range(3):
        bank.compute(frames_of([(0, {1: 2}), (0, {2: 9})]))
    assert all(map(torch.equal, map(rows_in, first), kept))


# Memory.


def blocks_of(bank: ExpertBank) -> dict[int, list[Block]]:
    """Return the blocks of each layer."""
    blocks: dict[int, dict[int, Block]] = {}
    for key, expert in bank.experts.items():
        assert isinstance(expert, DeviceExpert)
        blocks.setdefault(key.layer_id, {})[id(expert.block)] = expert.block
    return {layer_id: list(own.values()) for layer_id, own in blocks.items()}


def sizes_of(bank: ExpertBank) -> dict[int, list[int]]:
    """Return the numbers of experts in the blocks of each layer."""
    return {
        layer_id: [block.num_experts for block in own] for layer_id, own in blocks_of(bank).items()
    }


def allocated() -> int:
    gc.collect()
    return torch.accelerator.memory_allocated()


def test_a_layers_experts_lie_in_one_tensor_without_a_second_copy(
    folder: Path, device: EmulatedDevice
) -> None:
    checkpoint = open_checkpoint(folder)
    bank = bank_on(folder, device.device, KEYS[:3])
    load(bank, checkpoint, KEYS[3:7])
    load(bank, checkpoint, KEYS[7:])
    assert sizes_of(bank) == {0: [3, 1], 1: [3, 1]}
    staged_bytes = allocated() - bank.num_bytes
    check_as_host(folder, bank, BATCHES["two layers"])
    bank.settle()
    assert sizes_of(bank) == {0: [4], 1: [4]}
    check_as_host(folder, bank, BATCHES["two layers"])
    assert allocated() == bank.num_bytes + staged_bytes
    blocks = blocks_of(bank)
    bank.settle()
    assert blocks_of(bank) == blocks, "there was nothing to join"

    for key in (KEYS[0], KEYS[2], *KEYS[4:]):
        bank.release(key)
    del blocks
    bank.settle()
    assert sizes_of(bank) == {0: [2]}
    assert allocated() == bank.num_bytes + staged_bytes
    load(bank, checkpoint, KEYS[:1])
    bank.settle()
    check_as_host(folder, bank, [(0, {0: 2, 3: 3}), (0, {1: 1})])


def test_experts_come_and_go_under_a_batch(
    folder: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch computes with the weights that were held when it began."""
    frames = frames_of(BATCHES["all experts"])
    expected = bank_on(folder, HOST).compute(frames)
    bank = bank_on(folder, device.device, KEYS[:4])
    entered, may_go_on = threading.Event(), threading.Event()
    product = device_experts.grouped_ffn

    def slow(*args: Any) -> torch.Tensor:
        entered.set()
        assert may_go_on.wait(LIMIT_S)
        return product(*args)

    monkeypatch.setattr(device_experts, "grouped_ffn", slow)
    with ThreadPoolExecutor(1) as pool:
        try:
            batch = pool.submit(bank.compute, frames)
            assert entered.wait(LIMIT_S)
            for key in KEYS[:3]:
                bank.release(key)
            bank.settle()
            load(bank, open_checkpoint(folder), [ExpertKey("m", 0, 6)])
            bank.settle()
        finally:
            may_go_on.set()
        check(batch.result(LIMIT_S), expected)
    assert sorted(bank.experts) == [KEYS[3], ExpertKey("m", 0, 6)]
    check_as_host(folder, bank, [(0, {3: 2, 6: 1})])


def test_experts_of_a_full_device_stay_where_they_are(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(folder)
    with emulated_device(memory_bytes=6 * checkpoint.expert_bytes("float32")) as small:
        bank = bank_on(folder, small.device, KEYS[:2])
        load(bank, checkpoint, KEYS[2:4])
        bank.settle()
        assert sizes_of(bank) == {0: [2, 2]}
        assert "4 experts of a layer stay in 2 blocks with 4 places" in caplog.text
        check_as_host(folder, bank, BATCHES["all experts"])
        bank.release(KEYS[1])
        bank.settle()  # a third of the device suffices
        assert len(sizes_of(bank)[0]) == 2
        for key in KEYS[2:4]:
            bank.release(key)
        bank.settle()
        assert sizes_of(bank) == {0: [1]}


def raising(error: Exception) -> Any:
    def says_full(*args: Any) -> Any:
        raise error

    return says_full


FULL = [
    raising(torch.OutOfMemoryError("secret of the device")),
    raising(torch.AcceleratorError("secret of the device: CUDA error: out of memory")),
    raising(RuntimeError("secret of the device: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
]


@pytest.mark.parametrize("says_full", FULL)
@pytest.mark.parametrize("place", ["a layer's product", "to_device", "to_host"])
def test_rows_that_a_device_has_no_memory_for_are_refused_and_no_others(
    folder: Path,
    device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    says_full: Any,
) -> None:
    batch = [(0, {0: 3}), (1, {1: 5}), (0, {2: 2})]
    frames = frames_of(batch)
    expected = bank_on(folder, HOST).compute(frames)
    bank = bank_on(folder, device.device)
    compute = Block.compute
    full = bank.experts[ExpertKey("m", 1, 0)].block  # type: ignore[attr-defined]

    def failing(block: Block, *args: Any) -> Any:
        return says_full() if block is full else compute(block, *args)

    with monkeypatch.context() as patch:
        if place.startswith("to_"):
            patch.setattr(bank._device._staging, place, says_full)
        else:
            patch.setattr(Block, "compute", failing)
        answers = bank.compute(frames)
    refused = answers if place.startswith("to_") else answers[1:2]
    for answer in refused:
        assert isinstance(answer, ErrorFrame)
        assert isinstance(answer.error, OverloadedError)
        assert answer.error.retry_after_s
        assert "secret" not in str(answer.error)
    assert "secret of the device" in caplog.text
    if len(refused) == 1:
        check([answers[0], answers[2]], [expected[0], expected[2]])
        assert "has no memory for 5 rows" in str(refused[0])
    assert not any(key.layer_id for key, count in bank.tokens.items() if count)
    check(bank.compute(frames), expected)

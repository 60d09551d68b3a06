"""An actor whose experts are on an emulated device: what it loads, and what a full device does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.controller.records.last_words import LastWords
from cluster.errors import UnavailableError
from cluster.ray_private import MemoryStore
from cluster.spec import ExpertKey
from cluster.staging import RING, Staging
from cluster.wire.frames import ErrorFrame, RowsFrame, decode, joined
from experts import actor as actor_module
from experts.checkpoint.checkpoint import open_checkpoint
from experts.compute import expert_device
from experts.compute.device_experts import Block, DeviceExpert
from experts.compute.expert_device import RESERVED_ROWS
from tests.emulated_device import EmulatedDevice, emulated_device
from tests.unit.experts.local_actor import Actor, frame_of, local_actor, rows_of
from tests.unit.experts.test_bank_on_device import allocated, sizes_of

KEYS = [ExpertKey("m", layer_id, expert_id) for layer_id in (0, 2) for expert_id in range(4)]


@pytest.fixture(autouse=True)
def one_thread_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def on_device(folder: Path, keys: Sequence[ExpertKey]) -> Actor:
    return local_actor(folder, num_gpus=0.5, keys=keys)


def answers(actor: Actor, *expert_ids: int) -> list[bytes]:
    found = []
    for expert_id in expert_ids:
        answer = decode(actor.compute(frame_of(rows_of(3, expert_id), expert_id=expert_id)))
        assert isinstance(answer, RowsFrame), answer
        found.append(bytes(joined(answer.rows)))
    return found


def test_experts_are_loaded_to_the_accelerator_and_answer_as_on_the_host(
    folder: Path, device: EmulatedDevice
) -> None:
    actor = on_device(folder, [*KEYS[::-1], KEYS[0]])
    assert actor.describe().device == f"{device.device.type}:0"
    assert sizes_of(actor._bank) == {0: [4], 2: [4]}
    host = local_actor(folder, keys=KEYS)
    check_as_host(actor, host)
    expert_bytes = open_checkpoint(folder).expert_bytes("float32")
    assert actor.describe().weight_bytes == len(KEYS) * expert_bytes
    actor.unload(1, [KEYS[0], *KEYS[4:]])
    assert sizes_of(actor._bank) == {0: [3]}
    actor.load(1, actor._spec, KEYS[:1])
    assert sizes_of(actor._bank) == {0: [4]}
    staged_bytes = 1 << 10
    own_bytes = actor.describe().weight_bytes
    assert own_bytes <= allocated() <= own_bytes + staged_bytes
    check_as_host(actor, host)


def test_a_device_without_room_is_an_error_that_tells_the_bytes_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_bytes = open_checkpoint(folder).expert_bytes("float32")
    with emulated_device(memory_bytes=3 * one_bytes) as small:
        actor = on_device(folder, KEYS[:2])
        before = answers(actor, 0, 1)
        staged_bytes = torch.accelerator.memory_allocated() - 2 * one_bytes
        monkeypatch.setattr(actor_module, "load_expert", None)
        with pytest.raises(UnavailableError) as caught:
            actor.load(1, actor._spec, KEYS[:4])
        assert caught.value.field == "args.experts"
        lack = f"lacks {one_bytes + staged_bytes:,} bytes of the {2 * one_bytes:,} that are needed"
        assert re.search(rf"{small.device.type} of \S+ {lack}", caught.value.message)
        assert actor.describe().experts == tuple(KEYS[:2])
        assert answers(actor, 0, 1) == before


@pytest.mark.parametrize("num_read", [0, 2])
def test_an_allocation_that_fails_in_a_load_leaves_the_actor_what_it_holds(
    folder: Path,
    device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_read: int,
) -> None:
    actor = on_device(folder, KEYS[:2])
    before = answers(actor, 0, 1)
    write = DeviceExpert.write
    calls = []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) > num_read:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceExpert, "write", failing)
        patch.setattr(expert_device, "settled", lambda experts: None)  # joining writes, too
        with pytest.raises(UnavailableError, match=r"of \S+ has no [\d,]+ contiguous bytes"):
            actor.load(1, actor._spec, KEYS)
    assert "tried to allocate 20 GiB" in caplog.text
    held = tuple(KEYS[: 2 + num_read])
    assert actor.describe().experts == held
    actor._bank.settle()
    assert sizes_of(actor._bank) == {0: [len(held)]}
    assert answers(actor, 0, 1) == before
    assert actor.load(1, actor._spec, KEYS).experts == tuple(KEYS)


def test_the_largest_batch_of_several_frames_pins_no_more_memory(
    folder: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = on_device(folder, KEYS[:2])
    assert actor._device is not None
    staging = actor._device._staging
    ring = [*staging._to_host._ring, *staging._to_device._ring]
    before = [len(buffer._memory) for buffer in ring]
    for _ in range(RING):
        answer = decode(actor.compute(frame_of(rows_of(RESERVED_ROWS), expert_id=0)))
        assert not isinstance(answer, ErrorFrame)
    assert [len(buffer._memory) for buffer in ring] == before


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
def test_an_error_of_a_computation_ends_no_process_whose_device_works(
    folder: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(expert_device, "end_process", lambda: ended.append("ended"))
    actor = on_device(folder, KEYS[:2])
    monkeypatch.setattr(actor._queue.self_test, "note_failed", lambda frames: None)

    def failing(*args: Any) -> None:
        raise error("mat1 and mat2 shapes cannot be multiplied")

    with monkeypatch.context() as patch:
        patch.setattr(Block, "compute", failing)
        answer = decode(actor.compute(frame_of(rows_of(1), expert_id=0)))
    assert isinstance(answer, ErrorFrame)
    assert not ended
    assert answers(actor, 0)


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("call", ["start", "load", "unload", "compute", "report"])
def test_a_device_in_error_ends_the_process_and_the_log_says_why(
    folder: Path,
    device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    is_named: bool,
) -> None:
    """Also where the error does not say that it is the device's, and the device works no more."""
    ended: list[str] = []
    store = MemoryStore()
    words = LastWords("app", store)
    monkeypatch.setattr(
        expert_device, "end_process", lambda: ended.append(words.take("expert-0", 1))
    )
    monkeypatch.setattr(actor_module, "ray_store", lambda: store)
    actor = on_device(folder, KEYS[:2])
    # It tests on a thread of its own, which might end this process once the patches are undone.
    monkeypatch.setattr(actor._queue.self_test, "note_failed", lambda frames: None)

    def failing(*args: Any) -> None:
        error = torch.AcceleratorError if is_named else RuntimeError
        raise error("an illegal memory access was encountered\nCompile with more advice.")

    monkeypatch.setattr(torch.accelerator, "synchronize", failing)
    monkeypatch.setattr(Staging, "reserve", failing)  # pins memory
    if call != "start":
        monkeypatch.setattr(torch.accelerator, "get_memory_info", failing)
        monkeypatch.setattr(DeviceExpert, "write", failing)  # also joins what is left
        monkeypatch.setattr(Block, "compute", failing)
    if call == "compute":
        answer = decode(actor.compute(frame_of(rows_of(1), expert_id=0)))
        assert isinstance(answer, ErrorFrame)
        assert answer.kind == "InternalError"  # were the process still there
    else:
        calls = {
            "start": lambda: on_device(folder, KEYS[:2]),
            "load": lambda: actor.load(1, actor._spec, KEYS),
            "unload": lambda: actor.unload(1, KEYS[:1]),
            "report": lambda: actor._device and actor._device.free_bytes,
        }
        with pytest.raises(RuntimeError):
            calls[call]()
    assert ended[0] == "its device failed (an illegal memory access was encountered)"
    assert "expert-0 exits: its device failed (an illegal memory access" in caplog.text


def check_as_host(actor: Actor, host: Actor) -> None:
    """Check that both answer the same but for roundings."""
    for got, expected in zip(answers(actor, 0, 3), answers(host, 0, 3), strict=True):
        rows, right = (np.frombuffer(data, np.float32) for data in (got, expected))
        np.testing.assert_allclose(rows, right, rtol=1e-5, atol=1e-5)

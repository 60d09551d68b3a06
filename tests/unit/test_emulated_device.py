"""The emulated device computes as the host does, counts every copy, and refuses what is hidden."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.emulated_copies import ROOT, Kind
from tests.emulated_device import (
    DeviceTensor,
    EmulatedDevice,
    HostReadError,
    MixedDevicesError,
    emulated_device,
)

Tensor = torch.Tensor
Operation = Callable[[Tensor, Tensor], Any]


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated_device() as emulated:
        yield emulated


@pytest.fixture
def rows(device: EmulatedDevice) -> Tensor:
    """Values [4, 8] on the device."""
    return torch.arange(32.0).view(4, 8).to(device.device)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random values [4, 8] and ids [4, 3] below 4."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 8, generator=generator).to(dtype)
    return values, torch.randint(0, 4, (4, 3), generator=generator)


def write_through_views(x: Tensor, ids: Tensor) -> Tensor:
    x = x.clone()
    x.view(2, 16)[:, 3:7].add_(1)
    x.transpose(0, 1)[2].mul_(2)
    x[1:3, ::2] = 0.5
    x.unbind(0)[3].copy_(x[0])
    x.narrow(1, 0, 2).neg_()
    return x


def rewrite_in_place(x: Tensor, ids: Tensor) -> Tensor:
    x = x.clone()
    before = x[:, 1:]
    x.t_()
    grown = x.new_empty(0)
    torch.index_select(x, 0, ids[0], out=grown)
    return torch.cat((before.flatten(), x.flatten(), grown.flatten()))


OPERATIONS: dict[str, Operation] = {
    "scalars of the host": lambda x, ids: x * torch.tensor(3.0) + torch.tensor(2),
    "views": lambda x, ids: x.view(2, 16)[:, 1::3].t().unsqueeze(0).flatten(),
    "writes through views": write_through_views,
    "changes of shape in place": rewrite_in_place,
    "selections": lambda x, ids: (x.index_select(0, ids[0]), x[ids[:, 0]], x.gather(1, ids)),
    "expert rows": lambda x, ids: x.repeat_interleave(2, 0).index_select(0, ids.flatten()),
    "dtypes": lambda x, ids: (x.to(torch.float16), x.double(), x.long(), x.bool(), ids.float()),
    "reductions": lambda x, ids: (x.sum(-1), x.cumsum(0), x.argmax(-1), x.isfinite().all(dim=1)),
    "joining": lambda x, ids: (torch.cat((x, x), 1), torch.stack((x, x)), *x.split([1, 3])),
    "copies on the device": lambda x, ids: torch.zeros_like(x).copy_(x).contiguous().clone(),
    "factories": lambda x, ids: (
        torch.arange(3, device=x.device) + torch.full((3,), 2, device=x.device),
        torch.eye(3, device=x.device).tril(),
        torch.tensor([1.5, 2], device=x.device),
        x.new_tensor([1, 2]),
        x.new_zeros(2),
    ),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_results_have_the_hosts_bits(
    device: EmulatedDevice, operation: Operation, dtype: torch.dtype, inference: bool
) -> None:
    values, ids = inputs(dtype)
    with torch.inference_mode(inference), torch.no_grad():
        expected = operation(values, ids)
        found = operation(values.to(device.device), ids.to(device.device))
    if isinstance(expected, Tensor):
        expected, found = (expected,), (found,)
    for mine, hosts in zip(found, expected, strict=True):
        assert isinstance(mine, DeviceTensor)
        assert mine.device == device.device
        assert (mine.dtype, mine.shape, mine.stride()) == (hosts.dtype, hosts.shape, hosts.stride())
        mine_bits, host_bits = (one.contiguous().view(torch.uint8) for one in (mine.cpu(), hosts))
        assert torch.equal(mine_bits, host_bits)


HOST = torch.zeros(4, 8)
COPIES: dict[str, tuple[Callable[[Tensor], Any], list[tuple[Kind, int]]]] = {
    "to": (lambda x: HOST.to(x.device), [(Kind.TO_DEVICE, 128)]),
    "to with a dtype": (lambda x: HOST.to(x.device, torch.bfloat16), [(Kind.TO_DEVICE, 64)]),
    "to where it is": (lambda x: x.to(x.device), []),
    "to like another": (lambda x: HOST.to(x), [(Kind.TO_DEVICE, 128)]),
    "a dtype alone": (lambda x: x.to(torch.bfloat16), []),
    "copy_": (lambda x: x.copy_(HOST), [(Kind.TO_DEVICE, 128)]),
    "copy_ of a row": (lambda x: x.copy_(HOST[0]), [(Kind.TO_DEVICE, 32)]),
    "a row": (lambda x: x.__setitem__(1, HOST[0]), [(Kind.TO_DEVICE, 32)]),
    "tensor": (lambda x: torch.tensor([1.0, 2.0], device=x.device), [(Kind.TO_DEVICE, 8)]),
    "as_tensor": (
        lambda x: torch.as_tensor(np.ones(3, np.int64), device=x.device),
        [(Kind.TO_DEVICE, 24)],
    ),
    "a list as an index": (lambda x: x[[0, 2]], [(Kind.TO_DEVICE, 16)]),
    "cpu": (lambda x: x.cpu(), [(Kind.TO_HOST, 128)]),
    "cpu of a view": (lambda x: x[:, 1:3].cpu(), [(Kind.TO_HOST, 32)]),
    "to cpu": (lambda x: x.to("cpu"), [(Kind.TO_HOST, 128)]),
    "to cpu with a dtype": (lambda x: x.to("cpu", torch.float64), [(Kind.TO_HOST, 256)]),
    "copy_ to the host": (lambda x: torch.empty(4, 8).copy_(x), [(Kind.TO_HOST, 128)]),
    "numpy by force": (lambda x: x.numpy(force=True), [(Kind.TO_HOST, 128)]),
    "a shape": (lambda x: (x.shape, len(x), x.stride(), x.is_contiguous(), x.numel()), []),
    "a factory": (lambda x: torch.zeros(3, device=x.device), []),
    "a like of the host": (lambda x: torch.empty_like(HOST, device=x.device), []),
    "a like of the device": (lambda x: torch.empty_like(x, device="cpu"), []),
    "text": (lambda x: f"{x} {x!r}", []),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference"])
@pytest.mark.parametrize("name", COPIES)
def test_copies_are_counted(device: EmulatedDevice, name: str, inference: bool) -> None:
    act, expected = COPIES[name]
    with torch.inference_mode(inference), torch.no_grad():
        x = torch.ones(4, 8).to(device.device)
        with device.counted() as copies:
            act(x)
        assert [(access.kind, access.num_bytes) for access in copies.accesses] == expected


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool(x[0, 0] > 0),
    "int": lambda x: int(x[0, 0]),
    "index": lambda x: [1, 2][x[0, 0].long()],
    "slice": lambda x: x[: x[0, 0].long()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "dlpack": lambda x: np.from_dlpack(x),
    "data_ptr": lambda x: x.data_ptr(),
    "pickle": lambda x: pickle.dumps(x),
    "tensor of scalars": lambda x: torch.tensor([x[0, 0], x[0, 1]]),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "index_put_ by mask": lambda x: x.index_put_((x > 0,), x[0, 0]),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x[0].long().bincount(),
    "repeats": lambda x: x.repeat_interleave(x[:, 0].long(), 0),
    "one_hot": lambda x: functional.one_hot(x.long()),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_implicit_host_reads_raise(
    device: EmulatedDevice, read: Callable[[Tensor], Any], inference: bool
) -> None:
    with torch.inference_mode(inference), torch.no_grad(), device.counted() as copies:
        x = torch.ones(4, 8).to(device.device)
        with pytest.raises(HostReadError, match=r"implicit host read \(.*test_emulated_device"):
            read(x)
    assert len(copies.host_reads) == 1
    assert copies.to_host == []


MIXES: dict[str, Operation] = {
    "add": lambda x, host: x + host,
    "add to the host": lambda x, host: host.add_(x),
    "attention": lambda x, host: functional.scaled_dot_product_attention(x, host, x),
    "embedding": lambda x, host: functional.embedding(host.long(), x),
    "index": lambda x, host: x[host[0].long()],
    "index of the host": lambda x, host: host[x[0].long()],
    "index_copy_": lambda x, host: x.index_copy_(0, host[0, :1].long(), x[:1]),
    "out": lambda x, host: torch.index_select(x, 0, x[0].long(), out=host),
    "cat": lambda x, host: torch.cat((x, host)),
    "where": lambda x, host: torch.where(host > 0, x, x),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_tensors_of_host_and_device_do_not_mix(
    device: EmulatedDevice, mix: Operation, inference: bool
) -> None:
    with torch.inference_mode(inference), torch.no_grad(), device.counted() as copies:
        x = torch.zeros(4, 8).to(device.device)
        with pytest.raises(MixedDevicesError, match=r"test_emulated_device\.py:\d+"):
            mix(x, torch.zeros(4, 8))
    assert len(copies.mixed) == 1


def test_what_is_tolerated_is_recorded_and_computed(device: EmulatedDevice, rows: Tensor) -> None:
    with device.counted(tolerates=True) as copies:
        assert rows.tolist()[1][:2] == [8, 9]
        assert rows.sum().item() == 496
        assert (rows + torch.ones(4, 8)).cpu()[0, 0] == 1
        assert rows[rows > 30].cpu().tolist() == [31]
        host = torch.ones(4, 8)
        assert host.add_(rows) is host
        assert host[3, 7] == 32
    read, mixed, to_host = Kind.HOST_READ, Kind.MIXED, Kind.TO_HOST
    kinds = [access.kind for access in copies.accesses]
    assert kinds == [read, read, mixed, to_host, read, to_host, mixed]
    with pytest.raises(HostReadError):
        rows.tolist()


def test_sections_nest_and_can_be_cleared(device: EmulatedDevice, rows: Tensor) -> None:
    with device.counted() as outer:
        rows.cpu()
        with device.counted() as inner:
            rows.cpu()
            rows.copy_(torch.zeros(8))
        rows.cpu()
        assert (len(inner.to_host), len(inner.to_device)) == (1, 1)
        assert (len(outer.to_host), len(outer.to_device)) == (3, 1)
        outer.clear()
        assert str(outer) == "no access"
        rows.cpu()
    rows.cpu()
    assert len(outer.accesses) == len(outer.to_host) == 1


def test_any_thread_uses_the_device(device: EmulatedDevice) -> None:
    """Also one that was started before, as an actor's threads are, and one in inference mode."""
    ready, end = threading.Event(), threading.Event()

    def work(inference: bool) -> float:
        with torch.inference_mode(inference):
            made = torch.full((2, 8), 3.0, device=device.device) + torch.ones(8).to(device.device)
            return made.cpu().sum().item()

    def wait() -> float:
        ready.set()
        assert end.wait(20)
        return work(False)

    with ThreadPoolExecutor(3) as pool:
        early = pool.submit(wait)
        assert ready.wait(20)
        with device.counted() as copies:
            late = [pool.submit(work, True), pool.submit(work, False)]
            end.set()
            assert [job.result(20) for job in (early, *late)] == [64, 64, 64]
    assert [len(copies.to_device), len(copies.to_host)] == [3, 3]
    with ThreadPoolExecutor(1) as pool, pytest.raises(HostReadError):
        pool.submit(torch.ones(3).to(device.device).tolist).result(20)


def test_inference_tensors_are_what_they_are_on_the_host(device: EmulatedDevice) -> None:
    normal = torch.ones(4, 8).to(device.device)
    with torch.inference_mode():
        view, made = normal[1:], normal + 1
        made.add_(view[0])
    assert (view.is_inference(), made.is_inference()) == (False, True)
    with torch.no_grad():
        view.add_(1)
    assert normal.cpu()[:, 0].tolist() == [1, 2, 2, 2]
    assert made.cpu()[0, 0] == 3


def test_one_device_at_a_time_and_none_afterwards() -> None:
    with emulated_device() as device:
        kept = torch.ones(3).to(device.device)
        with pytest.raises(RuntimeError, match="emulated already"), emulated_device():
            pass
    assert kept.cpu().tolist() == [1, 1, 1]
    with pytest.raises(NotImplementedError):
        torch.ones(3).to(device.device)
    with emulated_device() as again:
        assert torch.ones(3).to(again.device).cpu().tolist() == [1, 1, 1]


def test_a_process_of_a_deployment_has_a_device_from_its_start_to_its_end() -> None:
    code = """
import threading, torch
from tests.emulated_device import HostReadError, emulate_process
emulate_process()
def work():
    rows = torch.ones(3, device=torch.accelerator.current_accelerator())
    try:
        rows.tolist()
    except HostReadError:
        print(rows.cpu().tolist())
threading.Thread(target=work).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1.0, 1.0, 1.0]\n", "")

"""Variable-length attention over pages, against gathered attention, on an emulated device."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.device import CPU
from router.engine.batch import pack
from router.model.attention.interface import Attention, Scoring, Span
from router.model.attention.paged import GatheredAttention
from router.model.attention.varlen import VarlenAttention, VarlenView, why_not_varlen
from router.model.kv_cache import PagedCache
from router.model.staged_batch import with_tensors
from tests import emulated_device as emulation
from tests.checkpoints import save_mixtral
from tests.emulated_device import EmulatedDevice
from tests.emulated_flash import varlen_attention
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok
from tests.local_cluster import LocalCluster, greedy_request

PAGE = VarlenAttention.page_size
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62]
GATHERING = {
    "deepseek_v2": "latents",
    "deepseek_v3": "latents",
    "gpt_oss": "sinks",
    "grok": "sinks",
}
"""The families whose attention it does not know, and a word of the reason."""
ALL: dict[str, Callable[[Path], Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}


def slots_of(pages: list[int], length: int) -> np.ndarray:
    slots = np.concatenate([np.arange(page * PAGE, (page + 1) * PAGE) for page in pages])
    return slots[:length]


class Layer:
    """A layer's keys and values on a device, and queries of given spans."""

    def __init__(self, device: EmulatedDevice, heads: tuple[int, int], size: int) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.device, self.heads, self.size = device.device, heads, size
        self.cache = PagedCache(1, (8, PAGE), heads[1], size, torch.bfloat16, self.device)
        for cached in (*self.cache.keys, *self.cache.values):
            cached.copy_(self.randn(*cached.shape))

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(torch.bfloat16)

    def query(self, spans: list[Span]) -> torch.Tensor:
        """Return [1, Q, T, D]."""
        count = sum(len(span.slots) - span.start for span in spans)
        return self.randn(count, self.heads[0], self.size).to(self.device).transpose(0, 1)[None]

    def attend(
        self, attention: Attention, query: torch.Tensor, spans: list[Span], has_window: bool
    ) -> torch.Tensor:
        num_decode = sum(len(span.slots) - span.start == 1 for span in spans)
        view = attention.view(spans, num_decode)
        view = with_tensors(view, lambda tensor: tensor.to(self.device))
        scoring = Scoring(0.25, has_window=has_window)
        return attention.attend(query, self.cache, 0, view, scoring).cpu().float()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 2 * PAGE), min_size=1, max_size=4),
    st.sampled_from([None, 1, 7, 300]),
    st.sampled_from([((4, 2), 16), ((2, 2), 8), ((6, 1), 64)]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_mixture_of_work_is_attended_as_with_gathered_pages_and_as_alone(
    device: EmulatedDevice,
    lengths: list[int],
    window: int | None,
    heads: tuple[tuple[int, int], int],
    has_window: bool,
    source: random.Random,
) -> None:
    layer = Layer(device, *heads)
    pages = list(range(8))
    source.shuffle(pages)
    spans = []
    for i, length in enumerate(lengths):
        start = length - 1 if source.random() < 0.5 else source.randrange(length)
        spans.append(Span(slots_of(pages[2 * i : 2 * i + 2], length), start))
    spans.sort(key=lambda span: len(span.slots) - span.start > 1)
    query = layer.query(spans)
    varlen = VarlenAttention(window)
    got = layer.attend(varlen, query, spans, has_window)
    expected = layer.attend(GatheredAttention(window), query, spans, has_window)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    begin = 0
    for span in spans:
        end = begin + len(span.slots) - span.start
        alone = layer.attend(varlen, query[:, :, begin:end], [span], has_window)
        assert torch.equal(alone, got[:, begin:end])
        begin = end


@pytest.mark.parametrize("family", ALL)
def test_each_family_attends_by_what_it_can(
    tmp_path: Path, device: EmulatedDevice, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    ALL[family](tmp_path)
    logits, views = [], []
    for where in (CPU, device.device):
        caplog.clear()
        cluster = LocalCluster(tmp_path, threaded=False, dtype="bfloat16", device=where)
        cluster.scheduler.add(greedy_request("r", PROMPT, 1))
        step = pack(cluster.scheduler.schedule(), cluster.model.attention)
        logits.append(cluster.forward(step)[0].cpu().float())
        views.append(step.pieces[0].batch.view)
    assert torch.cosine_similarity(*logits, dim=0).item() > 0.98
    if family in GATHERING:
        assert GATHERING[family] in caplog.text
    assert isinstance(views[1], VarlenView) == (family not in GATHERING)


# A device that cannot.


def wrong(*args: Any) -> Any:
    output, *others = varlen_attention(*args)
    return output + 0.1, *others


def company(*args: Any) -> Any:
    """Split the keys of long sequences in company, as split-K kernels do."""
    output, *others = varlen_attention(*args)
    is_crowd, is_long = len(args[3]) > 2, args[11].max() > PAGE
    rounded = torch.where(output.abs() < 1, output * (1 + 2**-7), output)
    return rounded if is_crowd and is_long else output, *others


def without_window(*args: Any) -> Any:
    output, *others = varlen_attention(*args)
    return output * (args[9][0] >= 0), *others


def window_of(change: int) -> Any:
    def kernel(*args: Any) -> Any:
        left, right = args[9]
        changed = left + change if left >= 0 else left
        return varlen_attention(*args[:9], [changed, right], *args[10:])

    return kernel


def no_window(*args: Any) -> Any:
    return varlen_attention(*args[:9], [-1, args[9][1]], *args[10:])


def aligned_at_the_top(*args: Any) -> Any:
    """Let a chunk's first token see the first key alone, as FlashAttention 1 did."""
    return varlen_attention(*args[:9], [args[9][0], args[9][1] - 1], *args[10:])


def full(*args: Any) -> Any:
    raise torch.OutOfMemoryError("the device is out of memory")


def refusing(*args: Any) -> Any:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nSecond line")


def without_image(*args: Any) -> Any:
    raise torch.AcceleratorError("no kernel image is available for execution on the device")


def broken(*args: Any) -> Any:
    raise torch.AcceleratorError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (varlen_attention, ""),
        (wrong, "its results on privateuseone:0 are 0.1"),
        (company, "depends on others of its step"),
        (without_window, "off"),
        (window_of(-1), "off"),
        (window_of(1), "off"),
        (no_window, "off"),
        (aligned_at_the_top, "off"),
        (refusing, "refuses it there (FlashAttention only supports Ampere GPUs or newer.)"),
        (without_image, "refuses it there (no kernel image"),
    ],
)
def test_it_is_tried_on_the_device_before_it_is_trusted(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, kernel: Any, reason: str
) -> None:
    monkeypatch.setattr(emulation, "varlen_attention", kernel)
    for heads, size in (((4, 2), 16), ((8, 2), 128)):
        said = why_not_varlen(device.device, torch.bfloat16, heads, size)
        assert said == reason if not reason else reason in said


@pytest.mark.parametrize(
    ("kernel", "works_after", "error", "words"),
    [
        (broken, False, torch.AcceleratorError, "memory"),
        (full, True, torch.OutOfMemoryError, "memory"),
        (refusing, False, RuntimeError, "Ampere"),
    ],
)
def test_a_trial_that_a_device_cannot_do_is_no_reason_but_an_error(
    device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    kernel: Any,
    works_after: bool,
    error: type[Exception],
    words: str,
) -> None:
    monkeypatch.setattr(emulation, "varlen_attention", kernel)
    if not works_after:
        monkeypatch.setattr(torch.accelerator, "synchronize", broken)
    with pytest.raises(error, match=words):
        why_not_varlen(device.device, torch.bfloat16, (4, 2), 16)


@pytest.mark.parametrize(
    ("dtype", "size", "reason"),
    [
        (torch.float32, 16, "half precision, not float32"),
        (torch.bfloat16, 20, "multiples of 8 up to 256, not 20"),
        (torch.bfloat16, 264, "multiples of 8 up to 256, not 264"),
    ],
)
def test_dtypes_and_sizes_that_it_never_takes_are_told(
    dtype: torch.dtype, size: int, reason: str
) -> None:
    assert reason in why_not_varlen(CPU, dtype, (4, 2), size)


def test_a_torch_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.model.attention.varlen.varlen", None)
    assert why_not_varlen(CPU, torch.bfloat16, (4, 2), 16) == f"torch {torch.__version__} has none"

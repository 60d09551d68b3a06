"""Models take turns in an actor's queue, by rows; one model's frames keep their order."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experts.fair_order import TURN_ROWS, FairOrder
from tests.unit.experts.frames import dispatch_frame


def item(model: str, num_rows: int, number: int = 0) -> SimpleNamespace:
    """A frame that waits."""
    frame = dispatch_frame(torch.empty(num_rows, 1), {0: num_rows}, request_id=number, model=model)
    return SimpleNamespace(frame=frame)


def order_of(*items: Any) -> FairOrder[Any]:
    order: FairOrder[Any] = FairOrder()
    for one in items:
        order.append(one)
    return order


def all_batches(order: FairOrder[Any]) -> list[list[Any]]:
    return list(iter(lambda: order.next_batch(1024), []))


@pytest.mark.parametrize("rows", [1, 1024, 5000])
def test_a_frame_alone_is_a_batch_however_large(rows: int) -> None:
    only = item("a", rows)
    order = order_of(only)
    assert [order.next_batch(1024), order.next_batch(1024)] == [[only], []]


def test_frames_of_one_model_come_in_order_as_many_as_a_batch_holds() -> None:
    items = [item("a", rows) for rows in (500, 500, 100, 900, 2000, 1)]
    assert all_batches(order_of(*items)) == [items[0:2], items[2:4], items[4:5], items[5:6]]


def test_small_frames_share_a_batch_and_wait_for_one_of_another_model_at_most() -> None:
    large, small = [item("a", 1024) for _ in range(8)], item("b", 3)
    batches = all_batches(order_of(*large, small))
    assert any(one is small for batch in batches[:2] for one in batch)
    items = [item(model, 8, number) for number in range(10) for model in "abc"]
    [batch] = all_batches(order_of(*items))
    assert sorted(map(id, batch)) == sorted(map(id, items))


def test_models_that_always_have_frames_get_even_shares_of_rows() -> None:
    """Whatever the sizes of their frames; by Shreedhar and Varghese, within a frame and a turn."""
    source = random.Random(1)
    sizes = {"a": (1, 4), "b": (300, 700), "c": (1000, 1024)}
    order = order_of()
    waiting = dict.fromkeys(sizes, 0)
    taken = dict.fromkeys(sizes, 0)
    for _ in range(400):
        for model, (least, most) in sizes.items():
            while waiting[model] < 4096:
                rows = source.randint(least, most)
                order.append(item(model, rows))
                waiting[model] += rows
        for one in order.next_batch(1024):
            waiting[one.frame.model] -= one.frame.num_rows
            taken[one.frame.model] += one.frame.num_rows
    assert max(taken.values()) - min(taken.values()) <= 1024 + 2 * TURN_ROWS


def test_every_frame_is_taken_once_and_each_model_keeps_its_order() -> None:
    source = random.Random(2)
    order, taken = order_of(), []
    for number in range(500):
        order.append(item(source.choice("abcd"), source.randint(1, 1500), number))
        if source.random() < 0.4:
            batch = order.next_batch(1024)
            assert len(batch) == 1 or sum(b.frame.num_rows for b in batch) <= 1024
            taken += batch
    taken += [one for batch in all_batches(order) for one in batch]
    assert sorted(one.frame.request_id for one in taken) == list(range(500))
    for model in "abcd":
        numbers = [one.frame.request_id for one in taken if one.frame.model == model]
        assert numbers == sorted(numbers)

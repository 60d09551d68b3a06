"""Native functions with any wrong length, number or content: an error, or memory of their own.

The calls are those of real steps. One argument at a time is changed at random, in exact copies of
all memory, so that an access beyond it is found where accesses are watched
(``tests/long/test_sanitized_native.py``); elsewhere the process has to live.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.native import native
from router.engine.sampling import _where_allowed
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster, greedy_request

pytestmark = pytest.mark.usefixtures("one_thread")
FUNCTIONS = (
    "summands_of", "route", "gather", "combine", "attend", "store", "normalise", "linear",
    "attention_inputs", "attention_outputs", "attention_half", "choose", "forbid", "draw", "ffn",
)  # fmt: skip
"""All but those that read and write sockets, which have tests of their own."""
MODELS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    ("mixtral", save_mixtral, "float32"),
    ("gpt_oss", SAVERS["gpt_oss"], "bfloat16"),
    ("qwen3_moe", SAVERS["qwen3_moe"], "float16"),
    ("deepseek_v3", SAVERS["deepseek_v3"], "float32"),
)
MAX_KEPT, CHANGES = 12, 60
NUMBERS = (-1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, -(2**63))
REFUSALS = (ValueError, TypeError, OverflowError, BufferError, MemoryError, LookupError)


def is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def copied(value: Any) -> Any:
    """Return an exact copy: memory of the same length, as writable as before."""
    if is_buffer(value):
        view = memoryview(value)
        data = bytearray(view.cast("B") if view.nbytes else b"")
        if isinstance(value, np.ndarray):
            return np.frombuffer(data, value.dtype).reshape(value.shape)
        return bytes(data) if view.readonly else data
    if isinstance(value, list | tuple):
        return _like(value, map(copied, value))
    return value


def _like(value: Any, items: Any) -> Any:
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items)


def changed(value: Any, source: random.Random) -> Any:
    """Return a value of the same kind that may not fit."""
    if is_buffer(value):
        data = bytearray(memoryview(value).cast("B") if memoryview(value).nbytes else b"")
        length = len(data)
        if source.random() < 0.4 and length:
            begin = source.randrange(length)
            for at in range(begin, min(length, begin + 16)):
                data[at] = source.randrange(256)
        else:
            new = source.choice([0, 1, length - 1, length + 1, length - 8, length + 8, 2 * length])
            data = (data + bytes(max(0, new - length)))[: max(0, new)]
        if isinstance(value, np.ndarray) and len(data) % value.itemsize == 0:
            return np.frombuffer(data, value.dtype)
        return bytes(data) if memoryview(value).readonly else data
    if isinstance(value, list | tuple):
        if not value or source.random() < 0.1:
            return _like(value, [*value, 1]) if not hasattr(value, "_fields") else value
        at = source.randrange(len(value))
        return _like(value, [changed(v, source) if i == at else v for i, v in enumerate(value)])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return source.choice([*NUMBERS, value - 1, value + 1, 2 * value])
    if isinstance(value, float):
        return source.choice([0.0, -1.0, float("nan"), float("inf"), 1e38])
    return source.choice([None, 0, b"", "nothing"])


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, ...]]]:
    """Copies of the arguments of different calls of each function, in steps of several models."""
    kept: defaultdict[str, dict[Any, tuple[Any, ...]]] = defaultdict(dict)
    with pytest.MonkeyPatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(native, name, _noting(name, getattr(native, name), kept[name]))
        for family, save, dtype in MODELS:
            folder: Path = tmp_path_factory.mktemp(family)
            save(folder)
            cluster = LocalCluster(folder, dtype=dtype)
            sampled = {"temperature": 1.0, "seed": 3, "top_p": 0.9, "logprobs": 2}
            cluster.generate(
                greedy_request("greedy", [5, 9, 7], 4),
                greedy_request("long", list(range(3, 60)), 3),
                greedy_request("sampled", [8, 2], 4, **sampled),
            )
            cluster.close()
        _where_allowed(torch.randn(3, 70), torch.randint(-9, 9, (3, 3), dtype=torch.int32))
    return {name: list(found.values()) for name, found in kept.items()}


def _noting(name: str, function: Any, found: dict[Any, tuple[Any, ...]]) -> Any:
    def noted(*arguments: Any) -> Any:
        kind = repr([_kind(argument) for argument in arguments])
        if kind not in found and len(found) < MAX_KEPT:
            found[kind] = copied(arguments)
        return function(*arguments)

    return noted


def _kind(value: Any) -> Any:
    if is_buffer(value):
        return memoryview(value).nbytes
    if isinstance(value, list | tuple):
        return [_kind(item) for item in value]
    return value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_changed_argument_is_refused_or_fits(
    calls: dict[str, list[tuple[Any, ...]]], name: str
) -> None:
    function, source = getattr(native, name), random.Random(name)
    assert calls[name]
    refused = 0
    for arguments in calls[name]:
        function(*copied(arguments))  # as it came
        for _ in range(CHANGES):
            at = source.randrange(len(arguments))
            given = copied(arguments)
            given = (*given[:at], changed(given[at], source), *given[at + 1 :])
            try:
                function(*given)
            except REFUSALS:
                refused += 1
    assert refused > CHANGES / 4

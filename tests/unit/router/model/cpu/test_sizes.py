"""A model whose sizes native code does not take is torch's, and has the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.native.built import native
from router.model.cpu import native_attention, native_layer, native_modules
from router.model.cpu.native_attention import NativeAttention
from router.model.cpu.native_layer import NativeGate
from router.model.decoder import MixtureFeedForward
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import save_deepseek_v3
from tests.local_cluster import LocalCluster, greedy_request

PROMPT = [5, 9, 7]


def generated(cluster: LocalCluster) -> tuple[int, ...]:
    [[event]] = cluster.generate(greedy_request("r", PROMPT, 6))
    cluster.close()
    return event.token_ids


def gates_of(cluster: LocalCluster) -> list[Any]:
    halves = [layer.feed_forward for layer in cluster.model.decoder._layers]
    return [half._gate for half in halves if isinstance(half, MixtureFeedForward)]


@pytest.mark.parametrize("save", [] if native is None else [save_mixtral, save_deepseek_v3])
@pytest.mark.parametrize(
    ("module", "limit"),
    [
        (native_attention, "MOST_HEADS"),
        (native_layer, "MOST_EXPERTS"),
        (native_modules, "MOST_SIZE"),
    ],
)
def test_a_size_beyond_native_code_goes_to_torch_with_the_same_tokens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    limit: str,
    save: Callable[[Path], Any],
) -> None:
    save(tmp_path)
    expected = generated(LocalCluster(tmp_path, dtype="float32"))
    monkeypatch.setattr(module, limit, 3)
    cluster = LocalCluster(tmp_path, dtype="float32")
    assert isinstance(cluster.model.attention, NativeAttention) == (limit != "MOST_HEADS")
    are_native = [isinstance(gate, NativeGate) for gate in gates_of(cluster)]
    assert are_native == [limit != "MOST_EXPERTS"] * len(are_native)
    assert not cluster.model.is_native or limit == "MOST_EXPERTS"
    assert generated(cluster) == expected

"""A model whose sizes native code does not take is torch's, and has the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.wire.tensors import TORCH_DTYPES
from router.model.cpu import native_attention, native_layer, native_modules
from router.model.cpu.native_attention import NativeAttention
from router.model.cpu.native_layer import NativeGate
from router.model.decoder import MixtureFeedForward
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS, save_deepseek_v3
from tests.local_cluster import LocalCluster, greedy_request

PROMPT = [5, 9, 7]


def generated(cluster: LocalCluster) -> tuple[int, ...]:
    [[event]] = cluster.generate(greedy_request("r", PROMPT, 6))
    cluster.close()
    return event.token_ids


def gates_of(cluster: LocalCluster) -> list[Any]:
    halves = [layer.feed_forward for layer in cluster.model.decoder._layers]
    return [half._gate for half in halves if isinstance(half, MixtureFeedForward)]


@pytest.mark.parametrize("save", [save_mixtral, save_deepseek_v3])
@pytest.mark.parametrize(
    ("module", "limit"),
    [(native_attention, "MAX_HEADS"), (native_layer, "MAX_EXPERTS"), (native_modules, "MAX_SIZE")],
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
    assert isinstance(cluster.model.attention, NativeAttention) == (limit != "MAX_HEADS")
    are_native = [isinstance(gate, NativeGate) for gate in gates_of(cluster)]
    assert are_native == [limit != "MAX_EXPERTS"] * len(are_native)
    assert not cluster.model.is_native
    assert cluster.model.is_independent == (limit == "MAX_EXPERTS")
    assert generated(cluster) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("exponent", [1.0, 2.0, None])
def test_a_gate_that_native_code_does_not_know_has_native_logits(
    tmp_path: Path, exponent: float | None, dtype: str
) -> None:
    """So a token's experts and weights have the same bits in any company there, too."""
    SAVERS["dbrx"](tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["ffn_config"]["moe_normalize_expert_weights"] = exponent
    file.write_text(json.dumps(config))
    cluster = LocalCluster(tmp_path, dtype=dtype)
    is_known = exponent != 2.0
    assert cluster.model.is_native == is_known
    assert cluster.model.is_independent
    [gate, *_] = gates_of(cluster)
    assert isinstance(gate, NativeGate) == is_known
    size = cluster.checkpoint.shape.hidden_size
    rows = torch.randn(40, size, generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[dtype])
    choice = gate.choice(rows)
    for t in range(len(rows)):
        alone = gate.choice(rows[t : t + 1])
        assert np.array_equal(alone.ids[0], choice.ids[t])
        assert torch.equal(alone.weights[0], choice.weights[t])
    cluster.close()

"""Two passes side by side against transformers' whole model, whose layers lose their experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint.checkpoint import open_checkpoint
from tests.unit.workshop.folders.families import save
from workshop.folders.layerwise import LayeredModel, LayerExperts
from workshop.folders.passes import Missed, twin_run

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = torch.randint(1, 300, (5, 25), generator=torch.Generator().manual_seed(1))


class NoExperts:
    """Replaces a layer's experts by zeros, and keeps what the states lacked before."""

    def __init__(self, missed: Missed) -> None:
        self._missed = missed

    def chosen(self, normed: torch.Tensor, ids: np.ndarray, weights: torch.Tensor) -> None: ...

    def computed(self, expert_id: int, weights: torch.Tensor, outputs: torch.Tensor) -> None: ...

    def result(self, experts: LayerExperts) -> dict[str, np.ndarray]:
        experts.replace(torch.zeros_like)
        return {"missed": self._missed().numpy()}


@torch.inference_mode()
def states_after(model: Any, layer_id: int, num_without: int) -> torch.Tensor:
    """Return the states after a layer [T, H] where the first layers have no experts."""
    kept: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, given, result: torch.zeros_like(result))
        for layer in model.model.layers[:num_without]
    ]
    hooks.append(
        model.model.layers[layer_id].register_forward_hook(
            lambda module, given, result: kept.append(result)
        )
    )
    model(input_ids=ROWS[:, :-1], use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept[0].flatten(0, 1)


@pytest.mark.parametrize("breaks_after", [None, 0, 1])
def test_each_layer_sees_what_the_new_ones_before_it_lack(
    breaks_after: int | None, tmp_path: Path
) -> None:
    model = save("mixtral", tmp_path / "model")
    layered = LayeredModel(open_checkpoint(tmp_path / "model"))
    rows = ROWS[:, :-1].contiguous()

    def new_observer(layer_id: int, missed: Missed) -> NoExperts:
        return NoExperts(missed)

    def break_off(done: int, total: int) -> None:
        if done == breaks_after:
            raise KeyboardInterrupt

    if breaks_after is not None:
        with pytest.raises(KeyboardInterrupt):
            twin_run(layered, rows, tmp_path / "pass", new_observer, break_off)
    seen = twin_run(layered, rows, tmp_path / "pass", new_observer, lambda done, total: None)
    assert sorted(seen) == list(range(layered.num_layers))
    for layer_id, found in seen.items():
        whole = states_after(model, layer_id, 0)
        expected = whole - states_after(model, layer_id, layer_id)
        # What is left of a difference has the roundings of the states, which are larger.
        atol = 1e-5 * float(whole.abs().max())
        np.testing.assert_allclose(found["missed"], expected, atol=atol)
    assert not seen[0]["missed"].any()
    assert np.abs(seen[1]["missed"]).max() > 1e-2

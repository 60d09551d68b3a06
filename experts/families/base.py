"""What a model family tells the rest of the system about its checkpoints.

Dimension letters: H hidden size, I intermediate size of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
"""A checkpoint's ``config.json``."""

ACTIVATION_NAMES = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
"""The values of ``hidden_act`` that :mod:`experts.ffn` computes; here, so that a checkpoint can be
checked without importing torch."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Sizes of the mixture of one model; every layer listed in ``layers`` has the same experts."""

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    activation: str


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """Names in the checkpoint of one gated expert's matrices.

    ``gate`` and ``up`` are [I, H], ``down`` is [H, I]: y = down(act(gate x) * up x).
    """

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one family's checkpoints and where its experts sit in transformers' class.

    ``experts_module`` and ``experts_class`` name the class that the router replaces by a
    parameter-free one; ``gate_name`` is what the block that has it calls its gate, whose output is
    (logits, weights, ids). ``dense_tensors`` lists name and shape of every tensor that a router
    needs; together with ``expert_tensors`` it is the whole checkpoint.
    """

    model_type: str
    architectures: tuple[str, ...]
    experts_module: str
    experts_class: str
    expert_shape: Callable[[Config], ExpertShape]
    expert_tensors: Callable[[int, int], ExpertTensors]
    dense_tensors: Callable[[Config], dict[str, tuple[int, ...]]]
    gate_name: str = "gate"

"""The gate in native code: logits, scores and the choice of a layer in one call.

Dimension letters: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch

from cluster.native.built import native
from cluster.wire.tensors import to_bytes
from experts.compute.panels import FORMATS
from experts.families.base import GateSpec
from router.model.cpu.native_linear import NativeLinear
from router.moe.gate import Gate

_SCORES = {"softmax": 0, "sigmoid": 1, "softmax_of_chosen": 2}


class NativeGate(Gate):
    """The gate of a family on a CPU; of equal scores that of the lower id comes first.

    Logits and scores are float32, also where transformers rounds them to the model's dtype. Only
    the weights have the dtype that they have there.
    """

    def __init__(
        self,
        spec: GateSpec,
        top_k: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        correction: torch.Tensor | None = None,
    ) -> None:
        """Pack copies of ``weight`` [E, H] and ``bias`` [E]; ``correction`` [E] as in `Gate`."""
        product = NativeLinear(weight, bias)
        super().__init__(spec, top_k, product, correction)
        self._product = product
        norm = spec.norm_exponent is not None
        self._spec_numbers = (
            _SCORES[spec.score],
            int(spec.weights_are_of_all),
            int(spec.renormalises),
            int(norm),
            spec.num_groups,
            spec.topk_groups,
            spec.best_of_group,
        )
        self._factors = spec.scaling_factor, self._below_all()
        self._correction_bytes = None if self._correction is None else to_bytes(self._correction)

    def choose(
        self, hidden_states: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`router.moe.gate.Gate.choose`."""
        assert native is not None
        product, num_tokens = self._product, len(hidden_states)
        dtype = self._weights_dtype(hidden_states.dtype)
        ids = torch.empty((num_tokens, self._top_k), dtype=torch.int64)
        weights = torch.empty((num_tokens, self._top_k), dtype=dtype)
        formats = product.format, FORMATS[hidden_states.dtype], FORMATS[dtype], product.has_bias
        native.choose(
            to_bytes(hidden_states),
            product.packed,
            self._correction_bytes,
            None if allowed is None else to_bytes(allowed),
            to_bytes(ids),
            to_bytes(weights),
            (product.in_features, product.out_features, self._top_k, *formats, *self._spec_numbers),
            self._factors,
            torch.get_num_threads(),
            None,
        )
        return ids, weights

    def _weights_dtype(self, hidden_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the weights for hidden states of ``hidden_dtype``."""
        spec = self._spec
        are_wide = "logits" in spec.float32 or (
            "scores" in spec.float32 and spec.score == "softmax"
        )
        return torch.float32 if are_wide and not self._rounds_weights else hidden_dtype


def can_choose(spec: GateSpec, weight: torch.Tensor) -> bool:
    """Return whether :class:`NativeGate` computes a gate; a norm must be that of exponent 1."""
    return (
        native is not None
        and weight.is_cpu
        and weight.dtype in FORMATS
        and spec.norm_exponent in (None, 1, 1.0)
        and math.isfinite(spec.scaling_factor)
    )

"""The experts of tokens in requests and replies: the check of a client's rows, and rows as JSON.

Rows are packed as :mod:`router.messages.routed` says. Dimension letters: N rows, L MoE layers, K
experts per token.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from cluster.errors import InvalidRequestError
from router.gateway.input.request import base
from router.gateway.input.request.model import Generation
from router.gateway.input.request.parts import ExpertRows
from router.messages.routed import LITTLE_ENDIAN, RoutedExperts, dtype_of
from router.served import ServedModel


def check_routed(
    asked: Generation, model: ServedModel, prompt_len: int, max_tokens: int
) -> RoutedExperts | None:
    """Return what a client asks of its tokens' experts, ``None`` if that is nothing.

    Raises :class:`InvalidRequestError`.
    """
    given, returned = asked.routed_experts, asked.return_routed_experts
    shape, num_experts = (model.num_layers, model.num_experts_per_tok), model.num_experts
    forced = b""
    if given is not None:
        # None replaces the experts.
        if asked.on_expert_loss not in (None, "strict"):
            told = base.wrong(asked.on_expert_loss, "strict with routed_experts")
            raise InvalidRequestError(told, "on_expert_loss")
        # The last token that is generated is never computed.
        lengths = prompt_len, max(prompt_len, prompt_len + max_tokens - 1)
        rows = _check_rows(given, shape, lengths)
        _check_ids(rows, "routed_experts.data", num_experts)
        forced = rows.astype(LITTLE_ENDIAN[dtype_of(num_experts)]).tobytes()
    return RoutedExperts(shape, num_experts, returned, forced) if returned or forced else None


def _check_rows(given: ExpertRows, shape: tuple[int, int], lengths: tuple[int, int]) -> np.ndarray:
    """Return the ids [N, L, K] of rows as a client packs them; N is within ``lengths``."""
    least, most = lengths
    if tuple(given.shape[1:]) != shape or not least <= given.shape[0] <= most:
        rows = f"{least}" if least == most else f"{least} to {most}"
        allowed = f"[{rows}, {shape[0]}, {shape[1]}]: tokens, MoE layers, experts per token"
        raise InvalidRequestError(base.wrong(given.shape, allowed), "routed_experts.shape")
    packed = np.dtype(LITTLE_ENDIAN[given.dtype])
    num_bytes = math.prod(given.shape) * packed.itemsize
    if len(given.data) != num_bytes:
        raise InvalidRequestError(
            f"has {len(given.data)} bytes; its shape needs {num_bytes}", "routed_experts.data"
        )
    return np.frombuffer(given.data, packed).reshape(given.shape)


def _check_ids(rows: np.ndarray, where: str, num_experts: int) -> None:
    """Refuse ids [N, L, K] of no expert, and an expert that a token has twice in a layer."""
    if (wrong := rows >= num_experts).any():
        token, layer, rank = np.argwhere(wrong)[0].tolist()
        raise InvalidRequestError(
            f"expert {rows[token, layer, rank]} of token {token} in MoE layer {layer} does not "
            f"exist; the model has {num_experts}",
            where,
        )
    ordered = np.sort(rows, axis=2)
    if (twice := ordered[:, :, 1:] == ordered[:, :, :-1]).any():
        token, layer, rank = np.argwhere(twice)[0].tolist()
        raise InvalidRequestError(
            f"token {token} has expert {ordered[token, layer, rank]} twice in MoE layer {layer}",
            where,
        )


def rows_shape(routed: RoutedExperts, rows: bytes | bytearray) -> list[int]:
    """Return the shape [N, L, K] of packed rows."""
    return [len(rows) // routed.row_bytes, *routed.shape]


def rows_object(routed: RoutedExperts, rows: bytes | bytearray) -> dict[str, Any]:
    """Return packed rows as JSON has them."""
    return {
        "data": base64.b64encode(rows).decode(),
        "dtype": routed.dtype,
        "shape": rows_shape(routed, rows),
    }

"""The experts of tokens in requests and replies: the check of a client's rows, and rows as JSON.

Rows are packed as :mod:`router.messages.routed` says. Dimension letters: N rows, L MoE layers, K
experts per token.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import InvalidRequestError, shown
from router.gateway import checks
from router.messages.routed import LITTLE_ENDIAN, RoutedExperts, dtype_of
from router.served import ServedModel

ROUTED_FIELDS = ("return_routed_experts", "routed_experts")
_PARTS = ("data", "dtype", "shape")


def asks_forced(given: Mapping[str, object]) -> bool:
    """Return whether a request forces experts, whose check may take long."""
    return given.get("routed_experts") is not None


def check_routed(
    given: Mapping[str, object],
    path: Callable[[str], str],
    model: ServedModel,
    prompt_len: int,
    max_tokens: int,
) -> RoutedExperts | None:
    """Return what a client asks of its tokens' experts, ``None`` where that is nothing.

    ``given`` are its sampling fields, of which ``path`` gives the client's names. Raises
    :class:`InvalidRequestError`.
    """
    if not any(name in given for name in ROUTED_FIELDS):
        return None
    name = "return_routed_experts"
    returned = checks.boolean(given.get(name, False), path(name))
    shape, num_experts = (model.num_layers, model.num_experts_per_tok), model.num_experts
    forced = b""
    if "routed_experts" in given:
        # The last token that is generated is never computed.
        lengths = prompt_len, max(prompt_len, prompt_len + max_tokens - 1)
        where = path("routed_experts")
        rows = _check_rows(given["routed_experts"], where, shape, lengths)
        _check_ids(rows, f"{where}.data", num_experts)
        forced = rows.astype(LITTLE_ENDIAN[dtype_of(num_experts)]).tobytes()
    return RoutedExperts(shape, num_experts, returned, forced) if returned or forced else None


def _check_rows(
    given: object, where: str, shape: tuple[int, int], lengths: tuple[int, int]
) -> np.ndarray:
    """Return the ids [N, L, K] of rows as a client packs them; N is within ``lengths``."""
    if not isinstance(given, Mapping) or set(given) != set(_PARTS):
        allowed = f"an object with {', '.join(_PARTS)}"
        raise InvalidRequestError(checks.wrong(given, allowed), where)
    dtype, shown_shape = given["dtype"], given["shape"]
    if not isinstance(dtype, str) or dtype not in LITTLE_ENDIAN:
        raise InvalidRequestError(
            checks.wrong(dtype, f"one of {', '.join(LITTLE_ENDIAN)}"), f"{where}.dtype"
        )
    numbers = list(shown_shape) if isinstance(shown_shape, Sequence) else []
    least, most = lengths
    is_ours = len(numbers) == 3 and all(type(number) is int for number in numbers)
    if not is_ours or tuple(numbers[1:]) != shape or not least <= numbers[0] <= most:
        rows = f"{least}" if least == most else f"{least} to {most}"
        allowed = f"[{rows}, {shape[0]}, {shape[1]}]: tokens, MoE layers, experts per token"
        raise InvalidRequestError(checks.wrong(shown_shape, allowed), f"{where}.shape")
    packed = np.dtype(LITTLE_ENDIAN[dtype])
    num_bytes = numbers[0] * shape[0] * shape[1] * packed.itemsize
    data = _check_data(given["data"], f"{where}.data", num_bytes)
    return np.frombuffer(data, packed).reshape(numbers)


def _check_data(given: object, where: str, num_bytes: int) -> bytes:
    """Return the bytes of gRPC's field, or of JSON's base64, which must be so many."""
    data = given
    if isinstance(given, str):
        try:
            data = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequestError("is not base64", where) from None
    if not isinstance(data, bytes):
        raise InvalidRequestError(checks.wrong(given, "a text, of base64"), where)
    if len(data) != num_bytes:
        raise InvalidRequestError(f"has {len(data)} bytes; its shape has {num_bytes}", where)
    return data


def _check_ids(rows: np.ndarray, where: str, num_experts: int) -> None:
    """Refuse ids [N, L, K] of no expert, and an expert that a token has twice in a layer."""
    if (wrong := rows >= num_experts).any():
        token, layer, rank = np.argwhere(wrong)[0].tolist()
        raise InvalidRequestError(
            f"expert {rows[token, layer, rank]} of token {token} in MoE layer {layer} is none of "
            f"the model's {num_experts}",
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


def check_contract(given: object, routed: RoutedExperts | None) -> None:
    """Refuse another ``on_expert_loss`` than ``strict`` for forced experts: none replaces them."""
    if routed is not None and routed.forced and given not in (None, "strict"):
        raise InvalidRequestError(
            f"given {shown(given)}, must be strict with routed_experts", "on_expert_loss"
        )

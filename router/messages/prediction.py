"""A prediction as gateway and router exchange it: named arrays in, named arrays out.

Dimension letter: P rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MIXTURE_PLATFORM = "expertmesh_mixture"
"""The platform of a mixture in the metadata of the Open Inference Protocol."""


@dataclass(frozen=True, slots=True)
class PredictionRequest:
    """Rows for a mixture, checked by the gateway.

    ``inputs`` are arrays [P, *shape] by the input's name, C-contiguous and of the input's datatype.
    ``outputs`` are the names of the outputs that the reply is to have. ``deadline_s`` is monotonic.
    ``interface`` is that of the mixture by which the gateway has checked the request
    (:func:`experts.mixture.spec.interface_of`).
    """

    request_id: str
    model: str
    inputs: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]
    deadline_s: float
    on_expert_loss: str = "strict"
    interface: str = ""
    tenant: str = ""
    """The name of the caller's keys; empty where there are no keys."""

    @property
    def num_rows(self) -> int:
        """P, the same for every input."""
        return len(next(iter(self.inputs.values())))

    def remaining_s(self) -> float:
        """Return the seconds that are left; negative after the deadline."""
        return self.deadline_s - time.monotonic()

    def to_wire(self) -> dict[str, Any]:
        """Return plain data, with the time left in place of the deadline."""
        return {
            "request_id": self.request_id,
            "model": self.model,
            "inputs": arrays_to_wire(self.inputs),
            "outputs": list(self.outputs),
            "time_left_s": self.remaining_s(),
            "on_expert_loss": self.on_expert_loss,
            "interface": self.interface,
            "tenant": self.tenant,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PredictionRequest:
        """Read :meth:`to_wire`; the time left counts from now."""
        return cls(
            wire["request_id"],
            wire["model"],
            arrays_from_wire(wire["inputs"]),
            tuple(wire["outputs"]),
            time.monotonic() + wire["time_left_s"],
            wire["on_expert_loss"],
            wire["interface"],
            wire["tenant"],
        )


@dataclass(frozen=True, slots=True)
class PredictionReply:
    """The outputs of a request: arrays [P, *shape] by the output's name.

    The dtype of an array is that of the output's datatype; texts (BYTES) are numpy's unicode.
    ``exact`` is false where a row was computed without an expert that the gate chose.
    ``identity`` is that of the mixture that answered.
    """

    outputs: Mapping[str, np.ndarray]
    exact: bool
    identity: str

    def to_wire(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "outputs": arrays_to_wire(self.outputs),
            "exact": self.exact,
            "identity": self.identity,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PredictionReply:
        """Read :meth:`to_wire`."""
        return cls(arrays_from_wire(wire["outputs"]), wire["exact"], wire["identity"])


def arrays_to_wire(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of each array by its name."""
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def arrays_from_wire(
    wire: Mapping[str, tuple[str, tuple[int, ...], bytes]],
) -> dict[str, np.ndarray]:
    """Read :func:`arrays_to_wire`; the arrays are read-only views of the bytes."""
    return {
        name: np.frombuffer(data, np.dtype(dtype)).reshape(shape)
        for name, (dtype, shape, data) in wire.items()
    }

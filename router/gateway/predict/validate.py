"""The validation of predictions: raw values in, a :class:`CheckedPrediction` out.

HTTP and gRPC hand over the client's values unchecked, so both accept and refuse the same.
Dimension letter: P rows, the batch axis.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from cluster.errors import InvalidRequestError, NotFiniteError, UnknownModelError, shown
from experts.mixture.parts import ClassesCombine, Input, Output
from experts.mixture.spec import MixtureSpec, default_outputs, output_shape, target_of
from router.config.deployment import GatewayConfig
from router.gateway.input.request import base
from router.gateway.predict.body import MAX_AXIS, InferParameters
from router.messages.prediction import PredictionRequest
from router.messages.tensor_bytes import NUMPY_DTYPES, array_of
from router.security.keys import Caller
from router.served import ServedMixture

MAX_ROWS = 65_536
"""The most rows of a request, whatever their size."""
_NUMBERS: Mapping[str, tuple[frozenset[type], str]] = {
    "BOOL": (frozenset({bool}), "true or false"),
    "UINT8": (frozenset({int}), "an integer from 0 to 255"),
    "INT32": (frozenset({int}), "an integer of 32 bits"),
    "INT64": (frozenset({int}), "an integer of 64 bits"),
    "FP32": (frozenset({int, float}), "a number"),
    "FP64": (frozenset({int, float}), "a number"),
}
"""The types of JSON that the values of a datatype have, and their description."""
VERSION = "1"
"""The only version of every model."""
REPLY_ROOM = 3
"""The limit of a reply, in multiples of ``gateway.max_body_bytes``: clients that take messages of
four times that size take such a reply."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """An input as a client sent it, unchecked.

    ``data`` is a list, flat or nested as ``shape`` says, or the tensor's bytes.
    """

    name: str
    datatype: object
    shape: Sequence[object]
    data: list[Any] | bytes | memoryview


def checked_array(raw: RawTensor, given: Input) -> np.ndarray:
    """Return an input's array [P, *shape], C-contiguous and without NaN and infinities.

    It may be a read-only view of the client's bytes. Raises :class:`InvalidRequestError` that names
    the tensor, before memory is taken for another size than the request's own.
    """
    where = f"inputs.{given.name}"
    if raw.datatype != given.datatype:
        raise InvalidRequestError(base.wrong(raw.datatype, given.datatype), f"{where}.datatype")
    shape = _checked_shape(raw.shape, given, f"{where}.shape")
    try:
        if isinstance(raw.data, list):
            array = _array_of_list(raw.data, given.datatype, shape)
        else:
            array = array_of(given.datatype, shape, raw.data)
    except ValueError as error:
        raise InvalidRequestError(str(error), where) from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row, value = _first_not_finite(array)
        raise InvalidRequestError(
            f"row {row} has {value}; all values must be finite in {given.datatype}", where
        )
    return array


def json_list(array: np.ndarray, where: str) -> list[Any]:
    """Return the values of an array in row-major order, for JSON.

    Raises :class:`NotFiniteError` for a value that JSON has no number for.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row, value = _first_not_finite(array)
        raise NotFiniteError(
            f"row {row} has {value}, which JSON cannot represent; request it with binary_data",
            where,
        )
    return array.ravel().tolist()


def _first_not_finite(array: np.ndarray) -> tuple[int, float]:
    place = np.unravel_index(np.flatnonzero(~np.isfinite(array))[0], array.shape)
    return int(place[0]), float(array[place])


def _checked_shape(shape: Sequence[object], given: Input, where: str) -> tuple[int, ...]:
    axes = tuple(
        base.integer(axis, f"{where}[{place}]", 1, MAX_AXIS) for place, axis in enumerate(shape)
    )
    allowed = (-1, *given.shape)
    if len(axes) != len(allowed) or any(
        n not in (-1, axis) for n, axis in zip(allowed, axes, strict=True)
    ):
        raise InvalidRequestError(
            f"must be {list(allowed)}, where -1 is any length; got {list(axes)[:8]}", where
        )
    if axes[0] > MAX_ROWS:
        raise InvalidRequestError(f"has {axes[0]} rows; at most {MAX_ROWS}", where)
    return axes


def _array_of_list(data: list[Any], datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    flat = _flattened(data, shape)
    count = math.prod(shape)
    if len(flat) != count:
        raise ValueError(f"data has {len(flat)} values; its shape needs {count}")
    types, allowed = _NUMBERS[datatype]
    if not types.issuperset(map(type, flat)):
        place = next(place for place, value in enumerate(flat) if type(value) not in types)
        raise ValueError(f"data[{place}]: {base.wrong(flat[place], allowed)}")
    dtype = NUMPY_DTYPES[datatype]
    if dtype.kind == "f":
        try:
            doubles = np.array(flat, np.float64)
        except OverflowError:
            raise ValueError("data has an integer that is too large for a float") from None
        with np.errstate(over="ignore"):  # an infinity is found later, with its row
            return doubles.astype(dtype, copy=False).reshape(shape)
    if dtype.kind == "b":
        return np.array(flat, dtype).reshape(shape)
    limits = np.iinfo(dtype)
    low, high = min(flat), max(flat)
    if low < limits.min or high > limits.max:
        wrong = low if low < limits.min else high
        raise ValueError(f"data has {shown(wrong)}; each value must be {allowed}")
    return np.array(flat, dtype).reshape(shape)


def _flattened(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return the values of a flat list, or of lists that are nested as the shape says."""
    if not data or not isinstance(data[0], list):
        return data
    level = [data]
    for depth, axis in enumerate(shape):
        for part in level:
            if not isinstance(part, list) or len(part) != axis:
                found = f"a list of {len(part)}" if isinstance(part, list) else shown(part)
                raise ValueError(
                    f"data has {found} on axis {depth}; its shape needs a list of {axis}"
                )
        level = list(chain.from_iterable(level))
    return level


@dataclass(frozen=True, slots=True)
class CheckedPrediction:
    """A request for a router, and the mixture that it is for."""

    request: PredictionRequest
    mixture: ServedMixture

    def of(self, caller: Caller) -> CheckedPrediction:
        """Return it as this caller's."""
        return replace(self, request=replace(self.request, tenant=caller.name))

    def outputs(self) -> list[Output]:
        """Return the requested outputs, in the order in which the client named them."""
        by_name = {output.name: output for output in self.mixture.spec.outputs}
        return [by_name[name] for name in self.request.outputs]


class PredictionValidator:
    """Checks requests against the served mixtures and the deployment's limits."""

    def __init__(
        self,
        mixtures: Mapping[str, ServedMixture],
        limits: GatewayConfig,
        language_models: Collection[str] = (),
    ) -> None:
        """``language_models`` are the ids of the other models."""
        self._mixtures = mixtures
        self._limits = limits
        self._language_models = language_models

    @property
    def mixtures(self) -> list[str]:
        """The ids of the served mixtures."""
        return list(self._mixtures)

    def check_known(self, model_id: str, version: str) -> None:
        """Raise :class:`UnknownModelError` for a model or a version that is not served."""
        if model_id not in self._mixtures and model_id not in self._language_models:
            served = ", ".join((*self._mixtures, *self._language_models))
            raise UnknownModelError(
                f"{shown(model_id)} is not served here; served: {served}", "model"
            )
        if version not in ("", VERSION):
            raise UnknownModelError(
                f"must be {VERSION}, the only version of {model_id}; got {shown(version)}",
                "model_version",
            )

    def mixture(self, model_id: str, version: str = "") -> ServedMixture:
        """Return a served mixture.

        Raises :class:`UnknownModelError`, and :class:`InvalidRequestError` with the right API for a
        language model.
        """
        self.check_known(model_id, version)
        if model_id in self._mixtures:
            return self._mixtures[model_id]
        raise InvalidRequestError(
            f"{model_id} is a language model, which has no tensors; use "
            "POST /v1/completions, POST /v1/chat/completions or expertmesh.v1.Inference/Generate",
            "model",
        )

    def check(
        self,
        model_id: str,
        version: str,
        tensors: Sequence[RawTensor],
        requested: Sequence[str],
        parameters: InferParameters,
    ) -> CheckedPrediction:
        """Check every tensor and set the deadline; without ``requested`` outputs all are.

        Raises :class:`InvalidRequestError` or :class:`UnknownModelError`.
        """
        mixture = self.mixture(model_id, version)
        timeout_s = self._timeout_s(parameters)
        outputs = _requested(tensors, requested, mixture.spec)
        inputs = _arrays(tensors, mixture.spec, outputs)
        self._check_reply_bytes(mixture.spec, outputs, inputs)
        request = PredictionRequest(
            request_id=uuid.uuid4().hex,
            model=mixture.id,
            inputs=inputs,
            outputs=tuple(output.name for output in outputs),
            deadline_s=time.monotonic() + timeout_s,
            on_expert_loss=parameters.on_expert_loss or self._limits.on_expert_loss,
            interface=mixture.interface,
        )
        return CheckedPrediction(request, mixture)

    def _timeout_s(self, asked: InferParameters) -> float:
        if asked.timeout is None:
            return asked.timeout_s or self._limits.default_timeout_s
        if asked.timeout_s is not None:
            raise InvalidRequestError(
                "cannot be given together with timeout_s", "parameters.timeout"
            )
        return asked.timeout / 1e6

    def _check_reply_bytes(
        self, spec: MixtureSpec, outputs: Sequence[Output], inputs: Mapping[str, np.ndarray]
    ) -> None:
        rows = inputs[spec.rows_input.name]
        row_bytes = sum(
            math.prod(abs(n) for n in expected_shape(spec, output, rows)[1:])
            * _value_bytes(spec, output)
            for output in outputs
        )
        limit = REPLY_ROOM * self._limits.max_body_bytes
        if len(rows) * row_bytes > limit:
            raise InvalidRequestError(
                f"the reply for {len(rows)} rows has {len(rows) * row_bytes} bytes; at most "
                f"{limit}. Request fewer rows or outputs.",
                "outputs",
            )


def expected_shape(spec: MixtureSpec, output: Output, rows: np.ndarray) -> tuple[int, ...]:
    """Return the shape of an output of a request, with the batch axis, by the experts' rows."""
    shape = output_shape(spec, output)
    if -1 in shape:
        shape = (rows.shape[1], *shape[1:])
    return (len(rows), *shape)


def _value_bytes(spec: MixtureSpec, output: Output) -> int:
    """Return the most bytes of one value of an output."""
    if output.datatype in NUMPY_DTYPES:
        return NUMPY_DTYPES[output.datatype].itemsize
    assert isinstance(spec.combine, ClassesCombine)  # no other has texts
    return 4 + max(len(str(label).encode()) for label in spec.combine.classes)


def _requested(
    tensors: Sequence[RawTensor], requested: Sequence[str], spec: MixtureSpec
) -> list[Output]:
    if not requested:
        return default_outputs(spec, [tensor.name for tensor in tensors])
    by_name = {output.name: output for output in spec.outputs}
    _check_names(requested, by_name, "outputs")
    return [by_name[name] for name in requested]


def _check_names(names: Iterable[str], known: Collection[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name not in known:
            raise InvalidRequestError(
                f"{shown(name)} is not one of the {where} {', '.join(known)}", where
            )
        if name in seen:
            raise InvalidRequestError("appears twice", f"{where}.{name}")
        seen.add(name)


def _arrays(
    tensors: Sequence[RawTensor], spec: MixtureSpec, outputs: Sequence[Output]
) -> dict[str, np.ndarray]:
    by_name = {given.name: given for given in spec.inputs}
    _check_names((tensor.name for tensor in tensors), by_name, "inputs")
    given_names = {tensor.name for tensor in tensors}
    for name, reason in _needed(spec, outputs).items():
        if name not in given_names:
            raise InvalidRequestError(f"is missing{reason}", f"inputs.{name}")
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        arrays[tensor.name] = checked_array(tensor, by_name[tensor.name])
    first, *others = arrays
    for name in others:
        if len(arrays[name]) != len(arrays[first]):
            raise InvalidRequestError(
                f"has {len(arrays[name])} rows, but {first} has {len(arrays[first])}",
                f"inputs.{name}.shape",
            )
    return arrays


def _needed(spec: MixtureSpec, outputs: Sequence[Output]) -> dict[str, str]:
    """Return the inputs that a request must have, and the reasons of those that not all need."""
    needed = {given.name: "" for given in spec.inputs}
    target = target_of(spec)
    used = {spec.rows_input.name, *(spec.gate_input(gate).name for gate in spec.gates.values())}
    if target is not None and target not in used:
        del needed[target]
        for output in outputs:
            if output.source == "log_density":
                needed[target] = f"; the output {output.name} needs it"
    return needed

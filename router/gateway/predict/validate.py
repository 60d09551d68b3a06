"""The validation of predictions: raw values in, a :class:`CheckedPrediction` out.

HTTP and gRPC hand over the client's values unchecked, so both accept and refuse the same.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import InvalidRequestError, UnknownModelError, shown
from experts.mixture.parts import ClassesCombine, Output
from experts.mixture.spec import MixtureSpec, default_outputs, output_shape, target_of
from router.config.deployment import GatewayConfig
from router.gateway.predict.body import InferParameters
from router.gateway.predict.tensors import RawTensor, checked_array
from router.messages.prediction import PredictionRequest
from router.messages.tensor_bytes import NUMPY_DTYPES
from router.security.keys import Caller
from router.served import ServedMixture

VERSION = "1"
"""The only version of every model."""
REPLY_ROOM = 3
"""The limit of a reply, in multiples of ``gateway.max_body_bytes``: clients that take messages of
four times that size take such a reply."""


@dataclass(frozen=True, slots=True)
class RawPrediction:
    """A client's request, whose tensors are unchecked.

    ``outputs`` are the names of the requested outputs; none means all.
    """

    model: str
    version: str
    inputs: Sequence[RawTensor]
    outputs: Sequence[str]
    parameters: InferParameters


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

    def check(self, raw: RawPrediction) -> CheckedPrediction:
        """Check every tensor and set the deadline.

        Raises :class:`InvalidRequestError` or :class:`UnknownModelError`.
        """
        mixture = self.mixture(raw.model, raw.version)
        timeout_s = self._timeout_s(raw.parameters)
        outputs = _requested(raw, mixture.spec)
        inputs = _arrays(raw.inputs, mixture.spec, outputs)
        self._check_reply_bytes(mixture.spec, outputs, inputs)
        request = PredictionRequest(
            request_id=uuid.uuid4().hex,
            model=mixture.id,
            inputs=inputs,
            outputs=tuple(output.name for output in outputs),
            deadline_s=time.monotonic() + timeout_s,
            on_expert_loss=raw.parameters.on_expert_loss or self._limits.on_expert_loss,
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


def _requested(raw: RawPrediction, spec: MixtureSpec) -> list[Output]:
    if not raw.outputs:
        return default_outputs(spec, [tensor.name for tensor in raw.inputs])
    by_name = {output.name: output for output in spec.outputs}
    _check_names(raw.outputs, by_name, "outputs")
    return [by_name[name] for name in raw.outputs]


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

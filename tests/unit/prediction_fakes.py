"""Mixtures without experts: real formats, and an upstream of plain functions of inputs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cluster.spec import ModelExperts, ModelSource
from experts.mixture.spec import MixtureSpec
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import Room
from router.gateway.metrics import Metrics
from router.gateway.predict.service import PredictionService
from router.messages.prediction import PredictionReply, PredictionRequest
from router.served import ServedMixture

LABELS = ("zero", "eins — 🙂", "two")
IDENTITY = "c0ffee"
LINEAR = {"kind": "linear", "file": "gate.safetensors"}
EXPERTS = {"a": {"kind": "linear", "file": "a.safetensors"}, "b": {"kind": "linear", "file": "b"}}
_DIGITS: dict[str, Any] = {
    "format": 1,
    "dtype": "float32",
    "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [4]}],
    "gate": "top",
    "gates": {"top": {**LINEAR, "choices": ["a", "b"]}},
    "experts": EXPERTS,
    "combine": {"kind": "probabilities", "classes": LABELS},
    "outputs": [
        {"name": "label", "datatype": "BYTES", "from": "label"},
        {"name": "probabilities", "datatype": "FP32", "from": "probabilities"},
        {"name": "experts", "datatype": "INT64", "from": "experts"},
    ],
}
_FLOW: dict[str, Any] = {
    "format": 1,
    "dtype": "float64",
    "inputs": [
        {"name": "features", "datatype": "FP64", "shape": [2, 3]},
        {"name": "site", "datatype": "INT32", "shape": [1]},
        {"name": "flags", "datatype": "BOOL", "shape": [2]},
        {"name": "bytes", "datatype": "UINT8", "shape": [1]},
        {"name": "counts", "datatype": "INT64", "shape": [1]},
    ],
    "gate": "by-site",
    "gates": {"by-site": {"kind": "given", "input": "site", "choices": ["a", "b"]}},
    "experts": EXPERTS,
    "combine": {"kind": "mean", "shape": [2]},
    "outputs": [{"name": "value", "datatype": "FP64", "from": "value"}],
}
_WAVES: dict[str, Any] = {
    "format": 1,
    "dtype": "float32",
    "inputs": [{"name": "steps", "datatype": "FP32", "shape": [-1, 2]}],
    "gate": "top",
    "gates": {"top": {**LINEAR, "choices": ["a"], "pool": "mean"}},
    "experts": {
        "a": {"kind": "rnn", "file": "a.safetensors", "cell": "gru", "returns": "sequence"}
    },
    "combine": {"kind": "mean", "shape": [-1, 1]},
    "outputs": [{"name": "value", "datatype": "FP32", "from": "value"}],
}
_DENSITY: dict[str, Any] = {
    **_DIGITS,
    "inputs": [*_DIGITS["inputs"], {"name": "target", "datatype": "FP32", "shape": [1]}],
    "combine": {"kind": "density", "dimensions": 1, "deviation": 1.0, "target": "target"},
    "outputs": [
        {"name": "mean", "datatype": "FP32", "from": "mean"},
        {"name": "log_density", "datatype": "FP32", "from": "log_density"},
    ],
}


def served_mixture(model_id: str, spec: Mapping[str, Any]) -> ServedMixture:
    """A mixture of which only the format is real."""
    parsed = MixtureSpec.model_validate(spec)
    experts = ModelExperts(f"{model_id}@1", (0,), len(parsed.experts), 0)
    return ServedMixture(
        ModelSource("unused", parsed.dtype, experts, "unused"), parsed, identity=IDENTITY
    )


MIXTURES = {
    model_id: served_mixture(model_id, spec)
    for model_id, spec in (
        ("digits", _DIGITS),
        ("team/flow", _FLOW),
        ("waves", _WAVES),
        ("density", _DENSITY),
    )
}


def computed(request: PredictionRequest) -> dict[str, np.ndarray]:
    """The outputs of a request: functions of all inputs, row by row."""
    inputs = request.inputs
    if request.model == "digits":
        pixels = inputs["pixels"]
        whole = {
            "label": np.array([LABELS[int(row[0]) % 3] for row in pixels], np.str_)[:, None],
            "probabilities": np.stack([pixels[:, 0], pixels[:, 1:].sum(1), pixels[:, 3]], 1),
            "experts": np.tile(np.array([0, -1], np.int64), (len(pixels), 1)),
        }
    elif request.model == "team/flow":
        parts = [array.reshape(len(array), -1).astype(np.float64) for array in inputs.values()]
        total = np.concatenate(parts, 1).sum(1)
        whole = {"value": np.stack([total, -total], 1)}
    elif request.model == "waves":
        whole = {"value": np.cumsum(inputs["steps"], 1)[:, :, :1].astype(np.float32)}
    else:
        mean = inputs["pixels"].mean(1, keepdims=True)
        whole = {"mean": mean}
        if "target" in inputs:
            with np.errstate(divide="ignore"):
                whole["log_density"] = np.log(inputs["target"])
    return {name: whole[name] for name in request.outputs}


class FakePredictions:
    """Answers at once, or with ``error``, or not until it is cancelled where it is ``endless``."""

    def __init__(self) -> None:
        self.requests: list[PredictionRequest] = []
        self.error: Exception | None = None
        self.exact = True
        self.endless = False
        self.cancelled = threading.Event()
        self.compute: Callable[[PredictionRequest], dict[str, np.ndarray]] = computed
        self.readiness = Readiness("", (3, 7), 0.25)
        self.not_ready: set[str] = set()

    async def predict(self, request: PredictionRequest) -> PredictionReply:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        if self.endless:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        return PredictionReply(self.compute(request), self.exact, IDENTITY)

    def ready(self) -> Readiness:
        return self.readiness

    def model_ready(self, model: str) -> Readiness:
        return Readiness("lost" if model in self.not_ready else "", (3, 7), 0.25)


def prediction_service(
    upstream: FakePredictions,
    limits: GatewayConfig,
    metrics: Metrics,
    room: Room,
    language_models: tuple[str, ...] = (),
    charges: Charges | None = None,
) -> PredictionService:
    """The service over all of :data:`MIXTURES`."""
    charges = charges or Charges(metrics)
    return PredictionService(MIXTURES, limits, upstream, metrics, room, charges, language_models)

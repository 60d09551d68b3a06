"""A fitted mixture as the content of a served folder, and back.

The folder's format is :mod:`experts.mixture.spec`. Rows are the input ``x``, everything is float64.

Dimension letters: E experts, D outputs of a regression, K classes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save
from skops.io import dumps

from cluster.errors import CheckpointError, shown
from experts.backends.classes import ClassMap
from experts.backends.errors import described
from experts.backends.skops_arrays import check_arrays
from experts.backends.skops_file import read_estimator
from experts.checkpoint.mixture import Mixture
from experts.mixture.parts import (
    DensityCombine,
    Expert,
    LinearExpert,
    LinearGate,
    MlpExpert,
    MlpGate,
    ProbabilitiesCombine,
    RnnExpert,
    SklearnExpert,
)
from router.mixture.scores import read_scores
from workshop.estimators.parts import (
    Array,
    EstimatorPart,
    ExpertPart,
    FittedMixture,
    GatePart,
    Layers,
    NetworkPart,
    RecurrentPart,
    named_tensors,
)

ROWS, TARGET = "x", "y"
"""The inputs of a request: rows, and the target of a log density."""
GATES_FILE = "gates.safetensors"
_DTYPE = "float64"


def content_of(
    mixture: FittedMixture, classes: npt.NDArray[Any] | None, description: str
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the document of ``mixture.yaml``, and the files that it names.

    A density is served as one where the format can say its deviations: of networks always, with
    scikit-learn estimators where one deviation holds for all experts and outputs. Other densities
    are served as the mean that ``predict`` returns. Raises :class:`CheckpointError`, whose field is
    the part, for an estimator that skops cannot write and for labels that are no integers or texts.
    """
    deviations = served_deviations(mixture)
    experts: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for number, (name, part) in enumerate(mixture.experts.items()):
        widened = None if deviations is None or np.ptp(deviations) == 0 else deviations[number]
        experts[name], data = _expert(name, part, widened)
        files[experts[name]["file"]] = data
    tensors: dict[str, Array] = {}
    gates = {}
    for name, gate in mixture.gates.items():
        gates[name] = _gate(name, gate)
        tensors |= {f"{name}/{key}": tensor for key, tensor in named_tensors(gate.layers).items()}
    files[GATES_FILE] = tensor_bytes(tensors, _DTYPE)
    rows = {"name": ROWS, "datatype": "FP64", "shape": list(mixture.row_shape)}
    document = {
        "format": 1,
        "description": description,
        "dtype": _DTYPE,
        "inputs": [rows],
        "gate": mixture.root,
        "gates": gates,
        "experts": experts,
        "combine": {"kind": "mean", "shape": [mixture.width]},
        "outputs": [],
    }
    outputs = {"value": "FP64"}
    if classes is not None:
        labels = served_labels(classes)
        document["combine"] = {"kind": "probabilities", "classes": labels}
        is_text = isinstance(labels[0], str)
        outputs = {"label": "BYTES" if is_text else "INT64", "probabilities": "FP64"}
    elif deviations is not None:
        combine = {"kind": "density", "dimensions": mixture.width, "target": TARGET}
        if np.ptp(deviations) == 0:
            combine["deviation"] = float(deviations[0, 0])
        document["combine"] = combine
        document["inputs"] = [rows, {"name": TARGET, "datatype": "FP64", "shape": [mixture.width]}]
        outputs = {"mean": "FP64", "variance": "FP64", "log_density": "FP64"}
    outputs |= {"experts": "INT64", "weights": "FP64"}
    document["outputs"] = [
        {"name": name, "datatype": datatype, "from": name} for name, datatype in outputs.items()
    ]
    return document, files


def served_deviations(mixture: FittedMixture) -> Array | None:
    """Return the deviations [E, D] that the format can say, or ``None``."""
    if mixture.kind != "density" or mixture.deviations is None:
        return None
    has_estimators = any(isinstance(part, EstimatorPart) for part in mixture.experts.values())
    if has_estimators and np.ptp(mixture.deviations) > 0:
        return None
    return mixture.deviations


def served_labels(classes: npt.NDArray[Any]) -> list[int] | list[str]:
    """Return labels as the format has them; raises :class:`CheckpointError` for other types."""
    labels = classes.tolist()
    if all(isinstance(label, str) for label in labels):
        return [str(label) for label in labels]
    if all(isinstance(label, int | float) and label == int(label) for label in labels):
        return [int(label) for label in labels]
    raise CheckpointError(
        f"labels must be integers or texts to be served (given: {shown(labels[0])})", "classes_"
    )


def _gate(name: str, gate: GatePart) -> dict[str, Any]:
    part: dict[str, Any] = {"kind": "linear", "file": GATES_FILE, "prefix": f"{name}/"}
    if len(gate.layers) > 1:
        part |= {"kind": "mlp", "activation": gate.activation}
    if gate.pool != "flatten":
        part["pool"] = gate.pool
    if gate.top_k is not None:
        part["top_k"] = gate.top_k
    return part | {"choices": list(gate.choices)}


def _expert(name: str, part: ExpertPart, widened: Array | None) -> tuple[dict[str, Any], bytes]:
    """Return an expert's section, and its file; ``widened`` are deviations [D] of its output."""
    if isinstance(part, EstimatorPart):
        section = {"kind": "sklearn", "file": f"{name}.skops", "method": part.method}
        try:
            return section, estimator_bytes(part.estimator)
        except Exception as error:  # skops and an estimator's own state may raise anything
            raise CheckpointError(
                f"skops cannot write the estimator: {described(error)}", f"experts.{name}"
            ) from error
    section = {"kind": "linear", "file": f"{name}.safetensors"}
    if part.link != "none":
        section["link"] = part.link
    if isinstance(part, RecurrentPart):
        tensors = dict(part.tensors)
        head = _widened((tensors["head.weight"], tensors["head.bias"]), widened)
        tensors |= {"head.weight": head[0], "head.bias": head[1]}
        return section | {"kind": "rnn", "cell": part.cell}, tensor_bytes(tensors, _DTYPE)
    if len(part.layers) > 1:
        section |= {"kind": "mlp", "activation": part.activation}
    layers = (*part.layers[:-1], _widened(part.layers[-1], widened))
    return section, tensor_bytes(named_tensors(layers), _DTYPE)


def _widened(layer: tuple[Array, Array], deviations: Array | None) -> tuple[Array, Array]:
    """Return a last layer with the constant outputs ``deviations`` [D] after its own."""
    if deviations is None:
        return layer
    weight, bias = layer
    zeros = np.zeros((len(deviations), weight.shape[1]))
    return np.concatenate([weight, zeros]), np.concatenate([bias, deviations])


def mixture_of(opened: Mixture) -> FittedMixture:
    """Read a folder that :func:`content_of` made.

    ``kind`` is ``mean`` for a density that was served as one. Raises :class:`CheckpointError` for a
    damaged or forbidden file, and for parts that no fitted mixture has.
    """
    spec = opened.spec
    gates = {}
    for name, gate in spec.gates.items():
        if not isinstance(gate, LinearGate | MlpGate) or not gate.renormalize:
            raise CheckpointError("is no gate of a fitted mixture", f"gates.{name}")
        scores = read_scores(opened, name, gate)
        activation = gate.activation if isinstance(gate, MlpGate) else "tanh"
        gates[name] = GatePart(
            _biased(scores.layers), gate.choices, gate.top_k, activation, gate.pool
        )
    experts = {name: _read_expert(opened, name, part) for name, part in spec.experts.items()}
    combine = spec.combine
    mixture = FittedMixture(
        spec.gate, gates, experts, "mean", spec.rows_input.shape, combine.shape[-1]
    )
    if isinstance(combine, ProbabilitiesCombine):
        return replace(mixture, kind="probabilities")
    if not isinstance(combine, DensityCombine):
        return mixture
    width = combine.dimensions
    mixture = replace(mixture, kind="density", width=width)
    if combine.deviation is not None:
        return replace(mixture, deviations=np.full((len(experts), width), combine.deviation))
    split = {name: _narrowed(name, part, width) for name, part in experts.items()}
    return replace(
        mixture,
        experts={name: part for name, (part, _) in split.items()},
        deviations=np.stack([deviations for _, deviations in split.values()]),
    )


def _read_expert(opened: Mixture, name: str, part: Expert) -> ExpertPart:
    where = f"{opened.folder / part.file}: experts.{name}"
    data = opened.file(part.file)
    if isinstance(part, SklearnExpert):
        estimator, _ = read_estimator(data, where)
        check_arrays(estimator)
        if not isinstance(opened.spec.combine, ProbabilitiesCombine):
            return EstimatorPart(estimator)
        classes = opened.spec.combine.classes
        places = ClassMap(classes).places(estimator.classes_, where)
        return EstimatorPart(estimator, "predict_proba", places, len(classes))
    if not isinstance(part, LinearExpert | MlpExpert | RnnExpert) or part.link == "sigmoid":
        raise CheckpointError("is no expert of a fitted mixture", where)
    tensors = load_tensors(data)
    if isinstance(part, RnnExpert):
        return RecurrentPart(part.cell, tensors, part.link)
    if isinstance(part, LinearExpert):
        return NetworkPart(((tensors["weight"], tensors["bias"]),), link=part.link)
    layers = tuple(
        (tensors[f"{place}.weight"], tensors[f"{place}.bias"]) for place in range(len(tensors) // 2)
    )
    return NetworkPart(layers, part.activation, part.link)


def _biased(layers: Sequence[tuple[Array, Array | None]]) -> Layers:
    return tuple(
        (weight, np.zeros(len(weight)) if bias is None else bias) for weight, bias in layers
    )


def _narrowed(name: str, part: ExpertPart, width: int) -> tuple[ExpertPart, Array]:
    """Return an expert without the constant outputs of :func:`_widened`, and these."""
    if isinstance(part, EstimatorPart):
        raise CheckpointError("is no expert of a fitted density", f"experts.{name}")
    if isinstance(part, RecurrentPart):
        weight, bias = part.tensors["head.weight"], part.tensors["head.bias"]
        head = {"head.weight": weight[:width], "head.bias": bias[:width]}
        return replace(part, tensors={**part.tensors, **head}), bias[width:]
    weight, bias = part.layers[-1]
    return replace(part, layers=(*part.layers[:-1], (weight[:width], bias[:width]))), bias[width:]


_SCHEMA = "schema.json"
_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest date that a zip archive can give a file."""


def estimator_bytes(estimator: Any) -> bytes:
    """Return a fitted estimator as a compressed skops file.

    skops names objects by their addresses and dates the archive. Numbers in order of appearance
    replace the addresses here, and a fixed date the other, so that equal estimators have equal
    bytes.
    """
    with zipfile.ZipFile(io.BytesIO(dumps(estimator))) as archive:
        schema = json.loads(archive.read(_SCHEMA))
        numbers: dict[int, int] = {}
        names: dict[str, str] = {}
        _renumber(schema, numbers, names)
        entries = {names[name]: archive.read(name) for name in archive.namelist() if name in names}
    if len(entries) != len(names):
        raise ValueError("the schema of skops names a file that is not in its archive")
    entries[_SCHEMA] = json.dumps(schema, separators=(",", ":")).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(entries.items()):
            archive.writestr(zipfile.ZipInfo(name, _DATE), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _renumber(node: Any, numbers: dict[int, int], names: dict[str, str]) -> None:
    """Replace the addresses in a schema; ``names`` gets the new name of each array's file."""
    if isinstance(node, dict):
        if "__id__" in node:
            node["__id__"] = numbers.setdefault(node["__id__"], len(numbers))
        if "file" in node and "__loader__" in node:
            node["file"] = names.setdefault(node["file"], f"{len(names)}.npy")
        for value in node.values():
            _renumber(value, numbers, names)
    elif isinstance(node, list):
        for value in node:
            _renumber(value, numbers, names)


def tensor_bytes(tensors: Mapping[str, np.ndarray], dtype: str) -> bytes:
    """Return tensors of one dtype as a safetensors file."""
    return save({name: np.array(t, dtype, order="C") for name, t in sorted(tensors.items())})

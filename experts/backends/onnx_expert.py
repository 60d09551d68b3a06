"""An expert that is an ONNX model, computed by onnxruntime on the CPU.

onnxruntime decides about all rounding: a row's result equals the model's own up to the order in
which its products add up.

Dimension letters: P rows, C classes of the mixture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnxruntime

from cluster.errors import CheckpointError
from experts.backends.classes import ClassMap
from experts.backends.errors import described
from experts.backends.onnx_file import self_contained
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.shards import listed_names
from experts.mixture.parts import OnnxExpert, RowsDtype, VoteCombine

_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64}
_LABELS = ("tensor(int64)", "tensor(int32)", "tensor(string)")
_FATAL = 4
"""onnxruntime's level of logging; its errors come as exceptions too."""


def onnx_model(mixture: Mixture, key: str, part: OnnxExpert, threads: int) -> OnnxModel:
    """Load an ONNX expert that computes on ``threads`` threads.

    Raises :class:`CheckpointError`, whose field has file and key, as :func:`self_contained` does,
    for a model that onnxruntime refuses, and for an input or output that does not fit the mixture.
    """
    where = f"{mixture.folder / part.file}: {key}"
    data = self_contained(mixture, part, where)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # Other formats that onnxruntime recognises by their bytes were not checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Threads that spin would take the processor from the actor's other threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception of its own for every status
        raise CheckpointError(f"onnxruntime refuses it: {described(error)}", where) from None
    return OnnxModel(session, len(data), mixture, part, where)


class OnnxModel:
    """Runs one input to one output of a session."""

    def __init__(
        self, session: Any, num_bytes: int, mixture: Mixture, part: OnnxExpert, where: str
    ) -> None:
        """Take over a session; raises :class:`CheckpointError` as :func:`onnx_model` does."""
        spec = mixture.spec
        self.num_bytes = num_bytes
        self._session = session
        given = _chosen(session.get_inputs(), part.input, f"{where}.input")
        others = [i.name for i in session.get_inputs() if i.name != given.name]
        if others:
            raise CheckpointError(
                f"the model also needs other inputs: {listed_names(others)}", f"{where}.input"
            )
        output = _chosen(session.get_outputs(), part.output, f"{where}.output")
        self._input, self._output = given.name, output.name
        self._dtype = _input_dtype(given, spec.dtype, f"{where}.input")
        self._row_shape = _fitting_shape(given, spec.rows_input.shape, f"{where}.input")
        self._votes = None
        if output.type in _LABELS and isinstance(spec.combine, VoteCombine):
            self._votes = ClassMap(spec.combine.classes)
        elif output.type not in _DTYPES:
            raise CheckpointError(
                f"the model's output {output.name} is {output.type}; must be "
                f"{' or '.join(_DTYPES)}, or labels under vote; a classifier is converted without "
                "ZipMap",
                f"{where}.output",
            )

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, *row shape] to outputs [P, *output shape]; labels become one 1 of [P, C]."""
        rows = rows.astype(self._dtype, copy=False).reshape(len(rows), *self._row_shape)
        (outputs,) = self._session.run([self._output], {self._input: rows})
        if self._votes is not None:
            return self._votes.one_hot(outputs.reshape(len(outputs), -1).squeeze(1))
        return outputs[:, None] if outputs.ndim == 1 else outputs


def _chosen(nodes: list[Any], name: str | None, where: str) -> Any:
    """Return the input or output of this name, or the only one."""
    names = [node.name for node in nodes]
    if name is None and len(nodes) == 1:
        return nodes[0]
    if name is None:
        raise CheckpointError(
            f"must be one of {listed_names(names)}, since the model has several", where
        )
    if name not in names:
        raise CheckpointError(f"must be one of {listed_names(names)} (given: {name})", where)
    return nodes[names.index(name)]


def _input_dtype(given: Any, dtype: RowsDtype, where: str) -> Any:
    found = _DTYPES.get(given.type)
    if found is None:
        raise CheckpointError(
            f"the model's input {given.name} is {given.type}; must be {' or '.join(_DTYPES)}", where
        )
    if dtype == "float64" and found is np.float32:
        raise CheckpointError(
            f"the model's input {given.name} is tensor(float), which does not represent every row "
            "of float64; convert the model with doubles, or set dtype: float32",
            where,
        )
    return found


def _fitting_shape(given: Any, row_shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return the shape in which the model takes a row; several axes may be flattened to one."""
    batch, *axes = given.shape or [1]
    for shape in (row_shape, (math.prod(row_shape),)):
        fits = len(axes) == len(shape) and all(
            not isinstance(axis, int) or axis == n for axis, n in zip(axes, shape, strict=True)
        )
        if fits and not isinstance(batch, int):
            return shape
    raise CheckpointError(
        f"the model's input {given.name} has the shape {given.shape}; must be any number of rows, "
        f"each of {list(row_shape)}, or flattened",
        where,
    )

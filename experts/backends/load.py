"""Loading one expert of a mixture, and calling it as the actors' bank does.

Dimension letters: P rows.
"""

from __future__ import annotations

import numpy as np

from cluster.errors import CheckpointError, ExpertFailedError
from experts.backends.errors import described
from experts.backends.torch_experts import Model, torch_model
from experts.checkpoint.mixture import Mixture
from experts.mixture.parts import Expert, OnnxExpert, SklearnExpert


class MixtureExpert:
    """A loaded expert of a mixture.

    ``row_shape`` is the shape of a row; its first axis is -1 where any length is taken. ``dtype``
    is that of rows and outputs, on the CPU. ``num_bytes`` are the resident bytes: exact for torch
    architectures, the file's (uncompressed) bytes for the other kinds.
    """

    grouped = None
    kernel_class = ""
    """Its library's kernels have no class that is known here."""

    def __init__(self, mixture: Mixture, name: str, model: Model) -> None:
        """Take over a loaded model."""
        spec = mixture.spec
        self.name = name
        self.num_bytes = model.num_bytes
        self.row_shape = spec.rows_input.shape
        self.dtype: str = spec.dtype
        self._model = model
        self._output_shape = spec.combine.shape
        self._numpy_dtype = np.dtype(spec.dtype)

    def takes(self, row_shape: tuple[int, ...]) -> bool:
        """Return whether rows of this shape fit; a length that may differ must be at least 1."""
        if self.row_shape[0] != -1:
            return row_shape == self.row_shape
        return (
            len(row_shape) == len(self.row_shape)
            and row_shape[0] >= 1
            and row_shape[1:] == self.row_shape[1:]
        )

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, *row shape] to contiguous outputs [P, *output shape] of ``dtype``.

        The first axis of a sequence's output is that of its row. Raises
        :class:`ExpertFailedError`, whose field is the expert's name, for any error of the model,
        and for an output of another shape or of no real number. Values that are not finite are
        returned.
        """
        shape = (len(rows), *self._shape_of(rows.shape[1]))
        if not len(rows):
            return np.empty(shape, self._numpy_dtype)
        try:
            with np.errstate(over="ignore"):  # a value that is not finite is noticed later
                outputs = np.asarray(self._model(rows))
            if outputs.dtype.kind not in "fiub":
                raise TypeError(f"returns values of dtype {outputs.dtype}")
            converted = np.require(outputs, self._numpy_dtype, ["C", "W"])
        except Exception as error:  # a library may raise anything
            raise ExpertFailedError(described(error), self.name) from error
        if converted.shape != shape:
            raise ExpertFailedError(
                f"returns the shape {list(converted.shape)} for {shape[0]} rows, not {list(shape)}",
                self.name,
            )
        return converted

    def _shape_of(self, length: int) -> tuple[int, ...]:
        shape = self._output_shape
        return (length, *shape[1:]) if len(shape) > 1 else shape


def load_mixture_expert(mixture: Mixture, expert_id: int, threads: int = 1) -> MixtureExpert:
    """Load one expert; no other part's file is read. An ONNX model runs on ``threads`` threads.

    Raises :class:`CheckpointError`, whose field has file and key, for a file that is damaged or not
    allowed, and for a model that does not fit the mixture.
    """
    name = mixture.spec.expert_names[expert_id]
    part = mixture.spec.experts[name]
    return MixtureExpert(mixture, name, _model_of(mixture, f"experts.{name}", part, threads))


def _model_of(mixture: Mixture, key: str, part: Expert, threads: int) -> Model:
    if isinstance(part, SklearnExpert):
        from experts.backends.sklearn_expert import sklearn_model  # seconds of imports

        return sklearn_model(mixture, key, part)
    if isinstance(part, OnnxExpert):
        try:
            from experts.backends.onnx_expert import onnx_model
        except ImportError as error:
            raise CheckpointError(
                f"needs onnxruntime and onnx ({error}); install expertmesh[onnx]",
                f"{mixture.folder / part.file}: {key}",
            ) from None
        return onnx_model(mixture, key, part, threads)
    return torch_model(mixture, key, part)

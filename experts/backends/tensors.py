"""The tensors of one gate or one expert in a safetensors file, by their names without the prefix.

Several parts of a mixture may share a file, each with a prefix of its own. Every tensor under a
part's prefix must belong to the part, so that no misspelt name passes as an absent tensor.

Dimension letters: F inputs of a layer, W outputs of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import SafetensorError, deserialize

from cluster.errors import CheckpointError, shown_name
from cluster.wire.arrays import DTYPES
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.shards import listed_names
from experts.mixture.parts import RowsDtype, ScoringGate, TorchExpert

Layer = tuple[np.ndarray, np.ndarray | None]
"""The weight [W, F] and the bias [W], or ``None`` without a bias."""
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_EXACT: Mapping[RowsDtype, tuple[str, ...]] = {
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64", "float32", "bfloat16", "float16"),
}
"""The stored dtypes each of whose values the mixture's dtype represents exactly."""
_LAYER_NAME = re.compile(r"(0|[1-9]\d{0,3})\.(?:weight|bias)")


class NamedTensors:
    """Tensors by name, each of which is taken once; a tensor that is not taken is an error."""

    def __init__(self, tensors: Mapping[str, np.ndarray], where: str, prefix: str = "") -> None:
        """``where`` is the field of errors, ``prefix`` that of the names in errors."""
        self.where = where
        self._prefix = prefix
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of this name that was not taken."""
        return name in self._tensors

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Return a tensor of this shape; -1 allows any length of an axis.

        Raises :class:`CheckpointError` for a missing tensor and for another shape.
        """
        if name not in self._tensors:
            raise CheckpointError(
                f"has no tensor {shown_name(self._prefix + name)}; under this prefix are: "
                f"{listed_names(sorted(self._tensors)) or 'none'}",
                self.where,
            )
        tensor = self._tensors.pop(name)
        fits = len(tensor.shape) == len(shape) and all(
            wanted in (-1, given) for given, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits or 0 in tensor.shape:
            wanted_shape = ", ".join("*" if n == -1 else str(n) for n in shape)
            raise CheckpointError(
                f"tensor {shown_name(self._prefix + name)} must have the shape [{wanted_shape}] "
                f"(given: {list(tensor.shape)})",
                self.where,
            )
        return tensor

    def take_if_there(self, name: str, *shape: int) -> np.ndarray | None:
        """Return a tensor as :meth:`take` does, or ``None`` without a tensor of this name."""
        return self.take(name, *shape) if name in self else None

    def linear(self, num_inputs: int, num_outputs: int, name: str = "") -> Layer:
        """Return ``weight`` [W, F] and the optional ``bias`` [W]; -1 allows any number."""
        weight = self.take(f"{name}weight", num_outputs, num_inputs)
        return weight, self.take_if_there(f"{name}bias", weight.shape[0])

    def layers(self, num_inputs: int, num_outputs: int) -> list[Layer]:
        """Return the layers ``0``, ``1`` …, each with as many inputs as its predecessor's outputs.

        Raises :class:`CheckpointError` for a missing layer and for one that does not fit.
        """
        numbers = {int(m[1]) for m in map(_LAYER_NAME.fullmatch, self._tensors) if m is not None}
        count = max(numbers, default=0) + 1
        found: list[Layer] = []
        for number in range(count):
            outputs = num_outputs if number == count - 1 else -1
            found.append(self.linear(num_inputs, outputs, f"{number}."))
            num_inputs = found[-1][0].shape[0]
        return found

    def finish(self) -> None:
        """Raise :class:`CheckpointError` where a tensor was not taken."""
        if self._tensors:
            names = sorted(self._prefix + name for name in self._tensors)
            raise CheckpointError(
                f"has tensors that are not used: {listed_names(names)}", self.where
            )


class PartTensors(NamedTensors):
    """The tensors of one part, in the mixture's dtype."""

    def __init__(self, mixture: Mixture, key: str, part: ScoringGate | TorchExpert) -> None:
        """Read the part's file.

        ``key`` is the part's place in ``mixture.yaml``. Raises :class:`CheckpointError`, whose
        field has file and key, for a file that is no safetensors file, and for a stored dtype that
        the mixture's dtype does not represent exactly.
        """
        super().__init__({}, f"{mixture.folder / part.file}: {key}", part.prefix)
        dtype = mixture.spec.dtype
        others = _other_prefixes(mixture, part)
        try:
            stored = deserialize(mixture.file(part.file))
        except SafetensorError as error:
            raise CheckpointError(f"is not a safetensors file: {error}", self.where) from None
        for name, tensor in stored:
            if not name.startswith(part.prefix) or name.startswith(others):
                continue
            stored_dtype = _NAMES.get(tensor["dtype"], tensor["dtype"])
            if stored_dtype not in _EXACT[dtype]:
                raise CheckpointError(
                    f"tensor {shown_name(name)} is {stored_dtype}, which {dtype} does not "
                    f"represent exactly; allowed: {', '.join(_EXACT[dtype])}",
                    self.where,
                )
            values = np.frombuffer(tensor["data"], DTYPES[stored_dtype])
            converted = values.reshape(tensor["shape"]).astype(DTYPES[dtype])
            if not np.isfinite(converted).all():
                raise CheckpointError(
                    f"tensor {shown_name(name)} has values that are not finite", self.where
                )
            self._tensors[name.removeprefix(part.prefix)] = converted


def bytes_of(layers: Sequence[Layer]) -> int:
    """Return the bytes of layers in memory."""
    return sum(array.nbytes for layer in layers for array in layer if array is not None)


def _other_prefixes(mixture: Mixture, part: ScoringGate | TorchExpert) -> tuple[str, ...]:
    """Return the longer prefixes, beginning with the part's, of other parts in the same file."""
    spec = mixture.spec
    parts = (*spec.gates.values(), *spec.experts.values())
    return tuple(
        {
            other.prefix
            for other in parts
            if isinstance(other, ScoringGate | TorchExpert)
            and other.file == part.file
            and other.prefix != part.prefix
            and other.prefix.startswith(part.prefix)
        }
    )

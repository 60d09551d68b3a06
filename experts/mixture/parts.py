"""The parts of ``mixture.yaml``: inputs, gates, experts, the combination, outputs.

:mod:`experts.mixture.spec` has the whole, and the checks of parts against each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

MIXTURE_FILE = "mixture.yaml"

InputDatatype = Literal["BOOL", "UINT8", "INT32", "INT64", "FP32", "FP64"]
OutputDatatype = Literal["INT64", "FP32", "FP64", "BYTES"]
"""Datatypes by their names in the Open Inference Protocol."""
RowsDtype = Literal["float32", "float64"]
Activation = Literal["relu", "tanh", "gelu", "silu", "sigmoid"]

MAX_ROW_VALUES = 1 << 24
"""The most values of a row, of an input or of an expert's output."""
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
EXACT_IN: Mapping[RowsDtype, tuple[InputDatatype, ...]] = {
    "float32": ("BOOL", "UINT8", "FP32"),
    "float64": ("BOOL", "UINT8", "INT32", "FP32", "FP64"),
}
"""The datatypes each of whose values the rows' dtype represents exactly."""


class Part(BaseModel):
    """A mapping of ``mixture.yaml``: unknown keys are errors, and nothing changes it later."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def checked_name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError(f"must be a name of letters, digits and ._- (given: {name!r:.80})")
    return name


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    least = [-1 if len(shape) > 1 and place == 0 else 1 for place in range(len(shape))]
    if any(n < low or n == 0 for n, low in zip(shape, least, strict=True)):
        raise ValueError("each axis must be at least 1; with several axes, the first may be -1")
    if abs(math.prod(shape)) > MAX_ROW_VALUES:
        raise ValueError(f"a row must have at most {MAX_ROW_VALUES} values")
    return shape


def _checked_file(file: str) -> str:
    path = PurePosixPath(file)
    is_plain = path.parts and not path.is_absolute() and ".." not in path.parts
    if not is_plain or str(path) != file or file == MIXTURE_FILE:
        raise ValueError(
            f"must be a plain relative path of another file in the folder (given: {file!r:.80})"
        )
    return file


class Input(Part):
    """A named tensor of a request: ``shape`` is that of one row, without the batch's axis."""

    name: str = Field(description="The tensor's name in requests.")
    datatype: InputDatatype = Field(description="The datatype of the Open Inference Protocol.")
    shape: tuple[StrictInt, ...] = Field(
        min_length=1,
        max_length=4,
        description="The shape of a row. The first of several axes may be -1: its length may then "
        "differ from request to request, as that of a sequence.",
    )

    _check_name = field_validator("name")(checked_name)
    _check_shape = field_validator("shape")(_checked_shape)

    @property
    def size(self) -> int:
        """The number of values of a row; negative where its length may differ."""
        return math.prod(self.shape)


OutputSource = Literal[
    "value", "label", "probabilities", "votes", "mean", "variance", "log_density",
    "experts", "weights",
]  # fmt: skip
GATE_SOURCES: tuple[OutputSource, ...] = ("experts", "weights")
"""The parts that every mixture has, whatever its combination."""


class Output(Part):
    """A named tensor of a reply: one part of the combination, or of the gate.

    ``experts`` are the numbers of the experts that a row was given to, in the order of ``experts:``
    and -1 where a row has fewer than another may have. ``weights`` are their weights.
    """

    name: str = Field(description="The tensor's name in replies.")
    datatype: OutputDatatype = Field(description="The datatype of the Open Inference Protocol.")
    source: OutputSource = Field(alias="from", description="The part of the combination.")

    _check_name = field_validator("name")(checked_name)


class GatePart(Part):
    """One gate of the tree: it chooses ``top_k`` of its ``choices``, gates or experts."""

    choices: tuple[str, ...] = Field(min_length=1, description="Names of gates or of experts.")


class ScoringGate(GatePart):
    """A gate with a score for each choice; the weights are the softmax of the scores.

    Scores are computed in the mixture's dtype from the input's values, flattened or pooled.
    """

    file: str = Field(description="A safetensors file with the gate's tensors.")
    prefix: str = Field(default="", max_length=200, description="The prefix of their names.")
    input: str | None = Field(default=None, description="The input; by default that of experts.")
    pool: Literal["flatten", "mean", "last"] = Field(
        default="flatten", description="How a row of several axes becomes one vector."
    )
    top_k: StrictInt | None = Field(default=None, ge=1, description="By default all choices.")
    renormalize: bool = Field(
        default=True, description="Whether the weights of the chosen add up to 1."
    )

    _check_file = field_validator("file")(_checked_file)

    @property
    def num_chosen(self) -> int:
        """The number of choices that a row is given to."""
        return len(self.choices) if self.top_k is None else self.top_k

    @model_validator(mode="after")
    def _check_top_k(self) -> ScoringGate:
        if self.num_chosen > len(self.choices):
            raise ValueError(f"top_k {self.top_k} exceeds the {len(self.choices)} choices")
        return self


class LinearGate(ScoringGate):
    """Scores ``weight`` [choices, F] x + ``bias`` [choices]; the bias may be absent."""

    kind: Literal["linear"]


class MlpGate(ScoringGate):
    """Scores of the layers ``0.weight``, ``0.bias``, ``1.weight`` …, activations between them."""

    kind: Literal["mlp"]
    activation: Activation = Field(default="relu", description="The function between layers.")


class GivenGate(GatePart):
    """The request chooses: a column of an integer input has the number of the choice, from 0."""

    kind: Literal["given"]
    input: str = Field(description="The integer input.")
    column: StrictInt = Field(default=0, ge=0, description="The place in the flattened row.")

    @property
    def num_chosen(self) -> int:
        """The number of choices that a row is given to."""
        return 1


Gate = Annotated[LinearGate | MlpGate | GivenGate, Field(discriminator="kind")]


class ExpertPart(Part):
    """One expert: a file inside the folder."""

    file: str = Field(description="The file of the expert's weights.")

    _check_file = field_validator("file")(_checked_file)


class TorchExpert(ExpertPart):
    """An expert of a named architecture, whose tensors are in a safetensors file."""

    prefix: str = Field(default="", max_length=200, description="The prefix of the tensors' names.")
    link: Literal["none", "softmax", "sigmoid"] = Field(
        default="none", description="The function that makes outputs of the last layer's values."
    )


class LinearExpert(TorchExpert):
    """``weight`` [W, F] x + ``bias`` [W]; the bias may be absent. Rows are flattened."""

    kind: Literal["linear"]


class MlpExpert(TorchExpert):
    """Layers ``0.weight``, ``0.bias``, ``1.weight`` …; rows are flattened."""

    kind: Literal["mlp"]
    activation: Activation = Field(default="relu", description="The function between layers.")


class RnnExpert(TorchExpert):
    """A recurrent network over rows [T, F], and a linear head.

    The tensors are those of a torch module with ``rnn`` (``torch.nn.RNN``, ``GRU`` or ``LSTM``,
    ``batch_first``, of one direction) and ``head`` (``torch.nn.Linear``). The state begins at zero.
    """

    kind: Literal["rnn"]
    cell: Literal["plain", "gru", "lstm"] = Field(description="The kind of the recurrent cell.")
    nonlinearity: Literal["tanh", "relu"] = Field(
        default="tanh", description="That of a plain cell."
    )
    returns: Literal["last", "sequence"] = Field(
        default="last", description="The head's output at the last step, or at every step."
    )


class SklearnExpert(ExpertPart):
    """A fitted scikit-learn estimator or pipeline in a skops file. Rows are flattened.

    Under ``probabilities`` and ``vote`` the estimator's classes must be among the mixture's; the
    others have probability 0. Under ``vote`` a decision function counts as the class of its largest
    score; the only score of two classes is that of the second.
    """

    kind: Literal["sklearn"]
    method: Literal["predict", "predict_proba", "decision_function"] = Field(
        default="predict", description="The method whose result is the expert's output."
    )


class OnnxExpert(ExpertPart):
    """An ONNX model, computed by onnxruntime on the CPU; needs the extra ``[onnx]``.

    Its input has one axis for any number of rows, and the row's own axes or all of them flattened.
    Its output's columns are in the order of the mixture's classes; under ``vote`` it may be labels.
    """

    kind: Literal["onnx"]
    input: str | None = Field(default=None, description="The model's input, if it has several.")
    output: str | None = Field(default=None, description="The model's output, if it has several.")
    data: tuple[str, ...] = Field(
        default=(), max_length=1024, description="The files of its external data, in the folder."
    )

    @field_validator("data")
    @classmethod
    def _check_data(cls, data: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_checked_file, data))


Expert = Annotated[
    LinearExpert | MlpExpert | RnnExpert | SklearnExpert | OnnxExpert,
    Field(discriminator="kind"),
]


class CombinePart(Part):
    """How the outputs of a row's experts become the reply, with the gate's weights."""


class MeanCombine(CombinePart):
    """``value``: the weighted sum of the outputs; a mean where the weights add up to 1."""

    sources: ClassVar[tuple[OutputSource, ...]] = ("value",)
    kind: Literal["mean"]
    shape: tuple[StrictInt, ...] = Field(
        min_length=1,
        max_length=2,
        description="The shape of an expert's output for one row; the first of two axes may be "
        "-1, the length of the row's sequence.",
    )

    _check_shape = field_validator("shape")(_checked_shape)


class ClassesCombine(CombinePart):
    """The classes of a classification, in the order of probabilities and votes."""

    # Strict, so that the texts "0" and "1" stay texts.
    classes: tuple[StrictInt, ...] | tuple[StrictStr, ...] = Field(
        min_length=2, max_length=MAX_ROW_VALUES, description="The labels."
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an expert's output for one row."""
        return (len(self.classes),)

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if len(set(classes)) < len(classes):
            raise ValueError("must differ from each other")
        return classes


class ProbabilitiesCombine(ClassesCombine):
    """``probabilities`` [C]: the weighted sum of the experts'; ``label``: the likeliest."""

    sources: ClassVar[tuple[OutputSource, ...]] = ("probabilities", "label")
    kind: Literal["probabilities"]


class VoteCombine(ClassesCombine):
    """``votes`` [C]: each expert gives its weight to its class; ``label``: the largest.

    An expert's class is its label, or the largest of its C scores; the first of equal ones.
    """

    sources: ClassVar[tuple[OutputSource, ...]] = ("votes", "label")
    kind: Literal["vote"]


class DensityCombine(CombinePart):
    """A mixture of normal densities with independent axes (Jacobs et al. 1991, section 3).

    An expert's output is ``dimensions`` means, followed by as many standard deviations unless
    ``deviation`` gives one for all. ``mean`` and ``variance`` [D] are those of the mixture.
    ``log_density`` is that of the input ``target``, which only requests for it need.
    """

    sources: ClassVar[tuple[OutputSource, ...]] = ("mean", "variance", "log_density")
    kind: Literal["density"]
    dimensions: StrictInt = Field(ge=1, le=65_536, description="D, the axes of the density.")
    deviation: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="The standard deviation of all axes."
    )
    target: str | None = Field(default=None, description="The input whose density is asked for.")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an expert's output for one row."""
        return (self.dimensions if self.deviation is not None else 2 * self.dimensions,)


Combine = Annotated[
    MeanCombine | ProbabilitiesCombine | VoteCombine | DensityCombine,
    Field(discriminator="kind"),
]

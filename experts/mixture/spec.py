"""The format of a mixture: ``mixture.yaml``, beside the files of its gates and experts.

Everything that can be checked without reading the other files is checked here; the rest, with every
expert loaded, by :mod:`experts.backends.check`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from pydantic import Field, model_validator

from experts.mixture.parts import (
    EXACT_IN,
    GATE_SOURCES,
    ClassesCombine,
    Combine,
    DensityCombine,
    Expert,
    Gate,
    GivenGate,
    Input,
    Output,
    OutputDatatype,
    Part,
    RnnExpert,
    RowsDtype,
    SklearnExpert,
    checked_name,
)

MAX_EXPERTS = 65_535
"""The most experts of a mixture: a frame numbers them in 16 bits."""
MAX_LEVELS = 64
"""The most levels of gates; a binary tree over the most experts has 16."""
_REALS: tuple[OutputDatatype, ...] = ("FP32", "FP64")
_INTEGERS = ("UINT8", "INT32", "INT64")


class MixtureSpec(Part):
    """A mixture: its inputs, the tree of its gates, its experts, their combination, its outputs."""

    format: Literal[1] = Field(description="The version of this format.")
    description: str = Field(default="", max_length=4096, description="Text for people.")
    dtype: RowsDtype = Field(
        description="The dtype of rows, gates and experts' outputs between router and experts."
    )
    inputs: tuple[Input, ...] = Field(
        min_length=1, max_length=64, description="The tensors of a request."
    )
    rows: str | None = Field(
        default=None, description="The input that experts take; by default the first."
    )
    gate: str = Field(description="The gate that every row comes to first, the root of the tree.")
    gates: dict[str, Gate] = Field(min_length=1, description="Gates by name.")
    experts: dict[str, Expert] = Field(
        min_length=1, max_length=MAX_EXPERTS, description="Experts by name."
    )
    combine: Combine = Field(description="How the outputs of experts become the reply.")
    outputs: tuple[Output, ...] = Field(
        min_length=1, max_length=64, description="The tensors of a reply."
    )

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The experts' names by their numbers, which are their places in ``experts``."""
        return tuple(self.experts)

    @property
    def rows_input(self) -> Input:
        """The input that experts take."""
        return self.inputs[0] if self.rows is None else self.input(self.rows)

    def input(self, name: str) -> Input:
        """Return an input by its name; raises ``ValueError`` for another name."""
        for given in self.inputs:
            if given.name == name:
                return given
        raise ValueError(
            f"{name!r} is not one of the inputs {_listed(i.name for i in self.inputs)}"
        )

    def gate_input(self, gate: Gate) -> Input:
        """Return the input that a gate looks at."""
        return self.rows_input if gate.input is None else self.input(gate.input)

    @model_validator(mode="after")
    def _check(self) -> MixtureSpec:
        _check_distinct((given.name for given in self.inputs), "inputs")
        _check_distinct((given.name for given in self.outputs), "outputs")
        _check_distinct((*self.gates, *self.experts), "gates and experts")
        for name in (*self.gates, *self.experts):
            checked_name(name)
        _check_exact("rows", self.rows_input, self.dtype)
        _check_tree(self.gate, self.gates, self.experts)
        for name, gate in self.gates.items():
            _check_gate(f"gates.{name}", gate, self.gate_input(gate), self.dtype)
            _check_weights(f"gates.{name}", gate, self.combine)
        for name, expert in self.experts.items():
            _check_expert(f"experts.{name}", expert, self.rows_input, self.combine)
        if isinstance(self.combine, DensityCombine) and self.combine.target is not None:
            _check_target(self.combine, self.input(self.combine.target), self.dtype)
        for output in self.outputs:
            _check_output(f"outputs.{output.name}", output, self.combine)
        return self


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _check_distinct(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where}: {name!r} is used twice")
        seen.add(name)


def _check_exact(where: str, given: Input, dtype: RowsDtype) -> None:
    """Check that the conversion of an input to the mixture's dtype changes no value."""
    if given.datatype not in EXACT_IN[dtype]:
        raise ValueError(
            f"{where}: {dtype} does not represent every {given.datatype} of input {given.name!r}; "
            f"allowed: {_listed(EXACT_IN[dtype])}"
        )


def _check_tree(root: str, gates: Mapping[str, Gate], experts: Mapping[str, Expert]) -> None:
    """Check that every gate and every expert is reached once from the root."""
    if root not in gates:
        raise ValueError(f"gate: {root!r} is not one of the gates {_listed(gates)}")
    parents: dict[str, str] = {}
    for name, gate in gates.items():
        for choice in gate.choices:
            if choice not in gates and choice not in experts:
                raise ValueError(f"gates.{name}.choices: {choice!r} is not a gate or an expert")
            if choice == root or choice in parents:
                other = (
                    "is the root"
                    if choice == root
                    else f"is already a choice of {parents[choice]!r}"
                )
                raise ValueError(
                    f"gates.{name}.choices: {choice!r} {other}; gates form a tree, without cycles"
                )
            parents[choice] = name
    reached, level = {root}, [root]
    for _ in range(MAX_LEVELS):
        level = [choice for name in level if name in gates for choice in gates[name].choices]
        reached.update(level)
    if any(name in gates for name in level):
        raise ValueError(f"gates: must have at most {MAX_LEVELS} levels")
    lost = [name for name in (*gates, *experts) if name not in reached]
    if lost:
        raise ValueError(
            f"gates: no path leads from the root {root!r} to {_listed(lost)}; gates form a tree, "
            "without cycles"
        )


def _check_gate(where: str, gate: Gate, given: Input, dtype: RowsDtype) -> None:
    if isinstance(gate, GivenGate):
        if given.datatype not in _INTEGERS or -1 in given.shape:
            raise ValueError(f"{where}.input: {given.name!r} must be of integers and a fixed shape")
        if gate.column >= given.size:
            raise ValueError(
                f"{where}.column: must be below {given.size}, the values of a row "
                f"(given: {gate.column})"
            )
        return
    _check_exact(f"{where}.input", given, dtype)
    if gate.pool != "flatten" and len(given.shape) != 2:
        raise ValueError(f"{where}.pool: {gate.pool} is for rows of two axes, [T, F]")
    if gate.pool == "flatten" and -1 in given.shape:
        raise ValueError(f"{where}.pool: flatten is for rows of one length; use mean or last")


def _check_weights(where: str, gate: Gate, combine: Combine) -> None:
    """Check that the weights of a mixture of densities add up to 1."""
    if isinstance(gate, GivenGate) or gate.renormalize or gate.num_chosen == len(gate.choices):
        return
    if isinstance(combine, DensityCombine):
        raise ValueError(
            f"{where}.renormalize: must be true for a density, whose weights add up to 1"
        )


def _check_expert(where: str, expert: Expert, rows: Input, combine: Combine) -> None:
    if isinstance(expert, RnnExpert):
        if len(rows.shape) != 2:
            raise ValueError(f"{where}: an rnn takes rows of two axes, [T, F]")
        if (expert.returns == "sequence") != (len(combine.shape) == 2):
            raise ValueError(
                f"{where}.returns: {expert.returns} does not match the combination's shape "
                f"{list(combine.shape)}"
            )
        if expert.returns == "sequence" and combine.shape[0] != rows.shape[0]:
            raise ValueError(
                f"combine.shape: a sequence must be as long as its row, {rows.shape[0]} "
                f"(given: {combine.shape[0]})"
            )
        return
    if -1 in rows.shape or len(combine.shape) == 2:
        raise ValueError(f"{where}: only an rnn takes rows of any length, or returns sequences")
    if isinstance(expert, SklearnExpert):
        allowed = _methods(combine)
        if expert.method not in allowed:
            raise ValueError(
                f"{where}.method: {expert.method} does not support {combine.kind}; allowed: "
                f"{_listed(allowed)}"
            )


def _methods(combine: Combine) -> tuple[str, ...]:
    """Return the methods of a scikit-learn estimator whose result a combination can use."""
    if combine.kind == "probabilities":
        return ("predict_proba",)
    if combine.kind == "vote":
        return ("predict", "predict_proba", "decision_function")
    return ("predict", "decision_function", "predict_proba")


def _check_target(combine: DensityCombine, target: Input, dtype: RowsDtype) -> None:
    if target.shape != (combine.dimensions,):
        raise ValueError(
            f"combine.target: input {target.name!r} must have the shape [{combine.dimensions}] "
            f"(given: {list(target.shape)})"
        )
    _check_exact("combine.target", target, dtype)


def _check_output(where: str, output: Output, combine: Combine) -> None:
    sources = (*combine.sources, *GATE_SOURCES)
    if output.source not in sources:
        raise ValueError(
            f"{where}.from: {combine.kind} has no {output.source}; allowed: {_listed(sources)}"
        )
    has_target = isinstance(combine, DensityCombine) and combine.target is not None
    if output.source == "log_density" and not has_target:
        raise ValueError(f"{where}.from: log_density needs combine.target")
    allowed = _datatypes(output, combine)
    if output.datatype not in allowed:
        raise ValueError(
            f"{where}.datatype: {output.source} must be {' or '.join(allowed)} "
            f"(given: {output.datatype})"
        )


def _datatypes(output: Output, combine: Combine) -> tuple[OutputDatatype, ...]:
    if output.source == "experts":
        return ("INT64",)
    if output.source == "label":
        is_text = isinstance(combine, ClassesCombine) and isinstance(combine.classes[0], str)
        return ("BYTES",) if is_text else ("INT64",)
    return _REALS


def interface_of(spec: MixtureSpec) -> str:
    """Return a hash of all that a request and its reply are checked by: tensors, gates, labels.

    Two mixtures with the same can answer each other's requests, as before and after a redeploy.
    """
    tensors = spec.model_dump_json(include={"inputs", "rows", "outputs", "combine"})
    read = sorted({spec.rows_input.name, *(spec.gate_input(g).name for g in spec.gates.values())})
    content = [tensors, read, most_experts(spec)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def target_of(spec: MixtureSpec) -> str | None:
    """Return the input whose log density is asked for, if there is one."""
    return spec.combine.target if isinstance(spec.combine, DensityCombine) else None


def default_outputs(spec: MixtureSpec, given: Collection[str]) -> list[Output]:
    """Return the outputs of a request that names none: all that its ``given`` inputs allow.

    That is every output, without a log density whose target is not given.
    """
    can_all = target_of(spec) in (None, *given)
    return [output for output in spec.outputs if can_all or output.source != "log_density"]


def output_shape(spec: MixtureSpec, output: Output) -> tuple[int, ...]:
    """Return the shape of an output for one row; the first of two axes may be -1."""
    combine = spec.combine
    if output.source in GATE_SOURCES:
        return (most_experts(spec),)
    if output.source == "label":
        return (1,)
    if output.source == "log_density":
        return (1,)
    if isinstance(combine, DensityCombine):
        return (combine.dimensions,)
    return combine.shape


def most_experts(spec: MixtureSpec, name: str | None = None) -> int:
    """Return the most experts that a row is given to below a gate; by default below the root."""
    gate = spec.gates.get(spec.gate if name is None else name)
    if gate is None:
        return 1
    below = sorted((most_experts(spec, choice) for choice in gate.choices), reverse=True)
    return sum(below[: gate.num_chosen])

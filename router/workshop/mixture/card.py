"""The card of a saved estimator, ``README.md``: its parts, its fit, how to serve and ask it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

LIBRARIES = ("expertmesh", "scikit-learn", "numpy", "skops")
_MOST_ROWS = 64
"""The most experts that the card lists one by one."""


def card_of(estimator: Any, document: Mapping[str, Any], name: str) -> str:
    """Return the card of a fitted estimator, whose ``mixture.yaml`` is ``document``.

    ``name`` is that of the folder. The figures are of the training rows.
    """
    rows = document["inputs"][0]
    example = _zeros(rows["shape"])
    outputs = ", ".join(f"`{output['name']}`" for output in document["outputs"])
    parts = [
        ("Rows", f"`{rows['name']}`, {rows['datatype']} {rows['shape']}"),
        ("Gates", ", ".join(_gate(key, gate) for key, gate in document["gates"].items())),
        ("Experts", _kinds(document["experts"])),
        ("Combination", _combination(document["combine"])),
        ("Outputs", outputs),
    ]
    names = getattr(estimator, "feature_names_in_", None)
    if names is not None:
        parts.insert(1, ("Features", ", ".join(f"`{feature}`" for feature in names)))
    fit = [
        ("Training rows", f"{estimator.n_samples_fit_:,}"),
        ("Iterations", f"{estimator.n_iter_}"),
        *_scores(estimator),
        *((key, f"`{value}`") for key, value in _changed(estimator).items()),
    ]
    usage = list(zip(document["experts"], estimator.expert_usage_, strict=True))
    shown = [(expert, f"{share:.4f}") for expert, share in usage[:_MOST_ROWS]]
    more = len(usage) - len(shown)
    return "\n".join(
        [
            f"# {name}",
            "",
            f"{document['description']}.",
            "",
            _table(("Part", ""), parts),
            "## Fit",
            "",
            _table(("", ""), fit),
            "The mean weight that the gates give each expert, over the training rows:",
            "",
            _table(("Expert", "Usage"), [*shown, ("others", str(more))] if more else shown),
            "## Use",
            "",
            f"Serve it by `expertmesh serve PATH/{name}`, or name the folder in a deployment file.",
            "",
            f"```yaml\nmodels:\n  - {{id: {name}, path: PATH/{name}}}\n```",
            "",
            "Ask it from Python; each row is a prediction:",
            "",
            "```python",
            "import numpy as np",
            "from router.client import Client",
            "",
            'with Client("127.0.0.1:9000") as client:',
            f'    reply = client.predict("{name}", {{"{rows["name"]}": np.array({example})}})',
            "print(reply.outputs)",
            "```",
            "",
            "Or over HTTP:",
            "",
            "```sh",
            f"curl -s http://127.0.0.1:8000/v2/models/{name}/infer "
            "-H 'content-type: application/json' -d "
            f'\'{{"inputs": [{{"name": "{rows["name"]}", "datatype": "FP64", '
            f'"shape": {_shape(example)}, "data": {example}}}]}}\'',
            "```",
            "",
            "Load the estimator again, without a server:",
            "",
            "```python",
            f"from {type(estimator).__module__} import {type(estimator).__name__}",
            "",
            f'estimator = {type(estimator).__name__}.load("PATH/{name}")',
            "```",
            "",
            "## Made with",
            "",
            _table(("", ""), [(library, version(library)) for library in LIBRARIES]),
        ]
    )


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {_cell(value)} |" for key, value in rows), ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _gate(name: str, gate: Mapping[str, Any]) -> str:
    num_choices = len(gate["choices"])
    return f"`{name}` ({gate['kind']}, {gate.get('top_k', num_choices)} of {num_choices})"


def _kinds(experts: Mapping[str, Any]) -> str:
    kinds = [expert["kind"] for expert in experts.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _combination(combine: Mapping[str, Any]) -> str:
    if "classes" in combine:
        return f"{combine['kind']} of {len(combine['classes'])} classes"
    if "dimensions" in combine:
        width = combine["dimensions"]
        return f"{combine['kind']} of {width} {'dimension' if width == 1 else 'dimensions'}"
    (width,) = combine["shape"]
    return f"{combine['kind']} of {width} {'value' if width == 1 else 'values'}"


def _scores(estimator: Any) -> list[tuple[str, str]]:
    """Return the scores that the fit recorded; a mixture without a likelihood has none."""
    scores = []
    if hasattr(estimator, "log_likelihood_"):
        scores.append(("Mean log likelihood", f"{estimator.log_likelihood_:.6g}"))
    if hasattr(estimator, "validation_scores_"):
        best = max(estimator.validation_scores_)
        scores.append(("Mean log likelihood, rows held out", f"{best:.6g}"))
    return scores


def _changed(estimator: Any) -> dict[str, Any]:
    """Return the parameters that differ from their defaults, by their texts."""
    defaults = type(estimator)().get_params(deep=False)
    given = estimator.get_params(deep=False)
    return {key: value for key, value in given.items() if repr(value) != repr(defaults[key])}


def _zeros(shape: Sequence[int]) -> Any:
    """Return a row of zeros for an example, as nested lists; one step where any number is taken."""
    row: Any = 0.0
    for size in reversed(shape):
        row = [row] * max(size, 1)
    return [row]


def _shape(nested: Any) -> list[int]:
    shape = []
    while isinstance(nested, list):
        shape.append(len(nested))
        nested = nested[0]
    return shape

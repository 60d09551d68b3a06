"""The card of a saved estimator, ``README.md``: its parts, its fit, how to serve and ask it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from workshop.tables import table

_MAX_ROWS = 64
"""The most experts that the card lists one by one."""


def card_of(estimator: Any, document: Mapping[str, Any], name: str) -> str:
    """Return the card of a fitted estimator, whose ``mixture.yaml`` is ``document``.

    ``name`` is that of the folder. The figures are of the training rows.
    """
    rows, cls = document["inputs"][0], type(estimator)
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
        ("Training rows", estimator.n_samples_fit_),
        ("Iterations", estimator.n_iter_),
        *_scores(estimator),
        *((key, f"`{value}`") for key, value in _changed(estimator).items()),
    ]
    shares = zip(document["experts"], estimator.expert_usage_, strict=True)
    usage: list[tuple[Any, Any]] = [(expert, f"{share:.4f}") for expert, share in shares]
    if len(usage) > _MAX_ROWS:
        usage[_MAX_ROWS:] = [("others", len(usage) - _MAX_ROWS)]
    # A row of zeros; one step where any number is taken.
    zeros = np.zeros((1, *(max(size, 1) for size in rows["shape"])))
    given = {"name": rows["name"], "datatype": "FP64", "shape": zeros.shape, "data": zeros.tolist()}
    return f"""# {name}

{document["description"]}.

{table(("Part", ""), parts)}

## Fit

{table(("", ""), fit)}

The mean weight that the gates give each expert, over the training rows:

{table(("Expert", "Usage"), usage)}

## Use

Serve it by `expertmesh serve PATH/{name}`, or name the folder in a deployment file:

```yaml
models:
  - {{id: {name}, path: PATH/{name}}}
```

Ask it over HTTP; each row is a prediction:

```sh
curl -s http://127.0.0.1:8000/v2/models/{name}/infer -H 'content-type: application/json' \\
    -d '{json.dumps({"inputs": [given]})}'
```

Load the estimator again, without a server:

```python
from {cls.__module__} import {cls.__name__}

estimator = {cls.__name__}.load("PATH/{name}")
```
"""


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

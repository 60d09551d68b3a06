"""A mixture's card: a template in ``cards/``, filled with measured figures and an example."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

from benchmarks.common import markdown
from cluster.processor import processor_name
from experts.checkpoint.identity import identity_of
from experts.checkpoint.mixture import Mixture
from router.messages.tensor_bytes import NUMPY_DTYPES
from tests.local_mixture import LocalMixture

_TEMPLATES = Path(__file__).parent / "cards"
_EXAMPLE = """\
## Use

With the mixture served by `serve run deploy/mixtures.yaml`:

```sh
curl -s http://127.0.0.1:8000/v2/models/{name}/infer \\
    -H 'content-type: application/json' -d '{asked}'
```

The outputs of the reply:

```json
{reply}
```

The same for each row of a CSV file, whose columns are named as the inputs, or are the values of the
first input in order:

```sh
expertmesh predict {name} rows.csv
```
"""
_MAKING = """\
## Made by

```sh
python -m benchmarks.bundled {name}
```

It writes this folder anew, with this card and its figures. Everything follows from seeds. On
another processor, or with other versions of the libraries, the last bits of the weights may differ.

{versions}"""


def filled(
    name: str,
    mixture: Mixture,
    local: LocalMixture,
    inputs: Mapping[str, np.ndarray],
    parts: Mapping[str, object],
) -> str:
    """Return a card: the template of this name with ``parts``, and ``inputs`` as an example."""
    example = _EXAMPLE.format(name=name, asked=_asked(local, inputs), reply=_reply(local, inputs))
    making = _MAKING.format(name=name, versions=_versions(mixture))
    template = (_TEMPLATES / f"{name}.md").read_text(encoding="utf-8")
    return template.format(**parts, example=example, making=making)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; real numbers have four digits after the point."""
    return markdown(header, [[_cell(value) for value in row] for row in rows])


def losses(fitted: Any, title: str) -> str:
    """Return the table of the losses by which an estimator with ``cv`` chose its mixture."""
    rows = [(f"`{name}`", loss) for name, loss in fitted.cv_losses_.items()]
    return table(("Mixture", title), rows)


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)


def converted(local: LocalMixture, name: str, rows: np.ndarray) -> np.ndarray:
    """Return rows [rows, *shape] in the dtype and shape of an input of fixed shape."""
    part = local.spec.input(name)
    return rows.astype(NUMPY_DTYPES[part.datatype]).reshape(len(rows), *part.shape)


def machine_name() -> str:
    """Return the processor's name and the number of its cores."""
    return f"{processor_name()}, {os.cpu_count()} cores"


def _versions(mixture: Mixture) -> str:
    rows = [
        ("Identity of the files (`expertmesh check --verify`)", f"`{identity_of(mixture)}`"),
        ("Files of gates and experts, bytes", mixture.num_bytes),
        ("Machine", machine_name()),
        ("Python", platform.python_version()),
        ("numpy", np.__version__),
        ("scikit-learn", sklearn.__version__),
        ("torch", torch.__version__),
    ]
    return table(("", ""), rows)


def _asked(local: LocalMixture, inputs: Mapping[str, np.ndarray]) -> str:
    return json.dumps({"inputs": _tensors(local.spec.inputs, inputs)})


def _reply(local: LocalMixture, inputs: Mapping[str, np.ndarray]) -> str:
    tensors = _tensors(local.spec.outputs, local.predict(inputs))
    lines = ",\n  ".join(map(json.dumps, tensors))
    return f'{{"outputs": [\n  {lines}\n]}}'


def _tensors(parts: Sequence[Any], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {
            "name": part.name,
            "datatype": part.datatype,
            "shape": list(arrays[part.name].shape),
            "data": arrays[part.name].ravel().tolist(),
        }
        for part in parts
        if part.name in arrays
    ]

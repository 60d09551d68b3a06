"""The answers of ``/v2``, the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping

from router.gateway.http.openapi.schema import (
    BOOLEAN,
    Schema,
    answer,
    either,
    integer,
    items,
    one_of,
    record,
    text,
)
from router.gateway.predict.tensors import MAX_AXIS
from router.messages.tensor_bytes import NUMPY_DTYPES, TEXT

_SIZE = integer(0, 2**63 - 1)
_AXIS = integer(1, MAX_AXIS)
_DESCRIBED = items(
    answer(name=text(1), datatype=one_of(*NUMPY_DTYPES, TEXT), shape=items(integer(-1)))
)


def _output() -> Schema:
    shared = {
        "name": text(1),
        "datatype": one_of(*NUMPY_DTYPES, TEXT),
        "shape": items(_AXIS),
    }
    return either(
        answer(**shared, data=items({"type": ["number", "boolean", "string"]})),
        answer(**shared, parameters=answer(binary_data_size=_SIZE)),
    )


PREDICTIONS: Mapping[str, Schema] = {
    "Server": answer(name=text(1), version=text(1), extensions=items(text(1))),
    "Live": answer(live=one_of(True)),
    "AllReady": answer(ready=BOOLEAN),
    "ModelReady": answer(name=text(1), ready=BOOLEAN),
    "ModelMetadata": answer(
        name=text(1),
        versions=items(text(1)),
        platform=text(1),
        inputs=_DESCRIBED,
        outputs=_DESCRIBED,
    ),
    "InferResponse": record(
        {
            "id": text(),
            "model_name": text(1),
            "model_version": text(1),
            "parameters": answer(exact=BOOLEAN, identity=text()),
            "outputs": items(_output()),
        },
        ["model_name", "model_version", "parameters", "outputs"],
    ),
    "PredictionError": answer(error=text(1)),
}
"""The schemas of answers by their name in the document."""

"""The bodies and answers of ``/v2``, the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.spec import ON_EXPERT_LOSS
from router.config.deployment import GatewayConfig
from router.gateway.http.openapi.schema import (
    BOOLEAN,
    NULL,
    Schema,
    answer,
    either,
    integer,
    items,
    number,
    one_of,
    record,
    text,
)
from router.gateway.predict.tensors import MAX_AXIS
from router.messages.tensor_bytes import NUMPY_DTYPES, TEXT

_SIZE = integer(0, 2**63 - 1)
_AXIS = integer(1, MAX_AXIS)
_HARMLESS = {"content_type": one_of("np")}
_DESCRIBED = items(
    answer(name=text(1), datatype=one_of(*NUMPY_DTYPES, TEXT), shape=items(integer(-1)))
)


def request(limits: GatewayConfig) -> Schema:
    """Return the schema of the JSON of ``POST /v2/models/ID/infer``."""
    parameters = record(
        {
            "timeout_s": number(0, limits.max_timeout_s, above=True),
            "timeout": integer(1, int(limits.max_timeout_s * 1e6)),
            "on_expert_loss": one_of(*ON_EXPERT_LOSS),
            "binary_data_output": BOOLEAN,
            **_HARMLESS,
        }
    )
    output = record(
        {
            "name": text(),
            "parameters": either(record({"binary_data": BOOLEAN, **_HARMLESS}), NULL),
        },
        ["name"],
    )
    return record(
        {
            "id": either(text(), NULL),
            "parameters": either(parameters, NULL),
            "inputs": items(_input()),
            "outputs": either(items(output), NULL),
        },
        ["inputs"],
    )


def _input() -> Schema:
    """Return the schema of an input: its values in JSON, or their size in what follows it."""
    shared = {
        "name": text(),
        "shape": items(_AXIS),
        "datatype": one_of(*NUMPY_DTYPES),
    }
    in_json = {"data": items({}), "parameters": either(record(_HARMLESS), NULL)}
    binary = {"parameters": record({"binary_data_size": _SIZE, **_HARMLESS}, ["binary_data_size"])}
    return either(
        record({**shared, **in_json}, [*shared, "data"]),
        record({**shared, **binary}, [*shared, "parameters"]),
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

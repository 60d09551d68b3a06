"""The calls of Triton's gRPC client that ``test_triton_grpc.py`` runs in an environment of its own.

    python triton_grpc_calls.py HOST:PORT

It imports nothing of ExpertMesh, and prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def tensor(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def main(address: str) -> dict[str, Any]:
    """Make every call; returns their results as plain data."""
    client = triton.InferenceServerClient(address)
    pixels = np.array([[0, 1, 2, 3], [1, 0.5, -1, 4]], np.float32)
    digits = [tensor("pixels", pixels, "FP32")]
    whole = client.infer("digits", digits, request_id="mine", client_timeout=20)
    some = client.infer(
        "digits", digits, model_version="1", outputs=[triton.InferRequestedOutput("label")],
        timeout=9_000_000, parameters={"on_expert_loss": "drop"}, client_timeout=20,
    )  # fmt: skip
    flow = client.infer(
        "team/flow",
        [
            tensor("features", np.ones((1, 2, 3)), "FP64"),
            tensor("site", np.ones((1, 1), np.int32), "INT32"),
            tensor("flags", np.ones((1, 2), bool), "BOOL"),
            tensor("bytes", np.full((1, 1), 255, np.uint8), "UINT8"),
            tensor("counts", np.full((1, 1), -5, np.int64), "INT64"),
        ],
        client_timeout=20,
    )
    try:
        client.infer("digits", [tensor("pixels", pixels[:, :3], "FP32")], client_timeout=20)
        refusal = ""
    except InferenceServerException as error:
        refusal = f"{error.status()} {error.message()}"
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models_ready": [client.is_model_ready(name) for name in ("digits", "team/flow", "tiny")],
        "extensions": client.get_server_metadata(as_json=True)["extensions"],
        "inputs": client.get_model_metadata("digits", as_json=True)["inputs"],
        "id": whole.get_response().id,
        "exact": whole.get_response().parameters["exact"].bool_param,
        "labels": [text.decode() for text in whole.as_numpy("label").ravel()],
        "probabilities": whole.as_numpy("probabilities").tolist(),
        "experts": whole.as_numpy("experts").tolist(),
        "some": [output.name for output in some.get_response().outputs],
        "flow": flow.as_numpy("value").tolist(),
        "refusal": refusal,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")

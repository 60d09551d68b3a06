"""Ways to the same predictions: in this process, or by the Open Inference Protocol.

Dimension letter: T rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np
import tritonclient.http as triton

from router.protos import open_inference_pb2 as messages
from router.protos import open_inference_pb2_grpc as stubs

TIMEOUT_S = 60.0
MAX_MESSAGE_BYTES = 64 << 20
NUMPY_DTYPES = {"UINT8": np.uint8, "FP32": np.float32, "FP64": np.float64, "INT64": np.int64}


@dataclass(frozen=True, slots=True)
class Question:
    """The input and the output of a model, by the names that one way has for them."""

    model: str
    input: str
    datatype: str
    output: str


class Way(Protocol):
    """Asks for predictions, several at once."""

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """Ask for the output of rows [T, *shape]; the returned function waits for it: [T, *]."""
        ...

    def close(self) -> None:
        """End all connections."""
        ...


class Local:
    """Calls functions of this process, by the models' names."""

    def __init__(self, functions: dict[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        self._functions = functions

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """See :class:`Way`; it is computed at once."""
        result = self._functions[question.model](rows)
        return lambda: result

    def close(self) -> None:
        """There is nothing to close."""


class Grpc:
    """Asks by gRPC with binary tensors (``raw_input_contents``), over one connection."""

    def __init__(self, port: int) -> None:
        sizes = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
        options = [(name, MAX_MESSAGE_BYTES) for name in sizes]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        self._stub = stubs.GRPCInferenceServiceStub(self._channel)

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """See :class:`Way`; errors of gRPC are raised as they are."""
        request = messages.ModelInferRequest(model_name=question.model)
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = question.input, question.datatype
        tensor.shape.extend(rows.shape)
        request.raw_input_contents.append(rows.tobytes())
        request.outputs.add().name = question.output
        call = self._stub.ModelInfer.future(request, timeout=TIMEOUT_S)

        def wait() -> np.ndarray:
            reply = call.result()
            [output], [data] = reply.outputs, reply.raw_output_contents
            return np.frombuffer(data, NUMPY_DTYPES[output.datatype]).reshape(output.shape)

        return wait

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


class Http:
    """Asks by Triton's HTTP client, with binary tensors or with JSON."""

    def __init__(self, port: int, connections: int, is_binary: bool) -> None:
        self._client = triton.InferenceServerClient(
            f"127.0.0.1:{port}", concurrency=connections, network_timeout=TIMEOUT_S
        )
        self._is_binary = is_binary

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """See :class:`Way`; errors of the client are raised as they are."""
        tensor = triton.InferInput(question.input, list(rows.shape), question.datatype)
        tensor.set_data_from_numpy(rows, binary_data=self._is_binary)
        output = triton.InferRequestedOutput(question.output, binary_data=self._is_binary)
        asked: Any = self._client.async_infer(question.model, [tensor], outputs=[output])

        def wait() -> np.ndarray:
            result: np.ndarray = asked.get_result().as_numpy(question.output)
            return result

        return wait

    def close(self) -> None:
        """End the connections."""
        self._client.close()


def ask_in_turn(
    way: Way, question: Question, batches: Sequence[np.ndarray], clock: Callable[[], float]
) -> list[float]:
    """Ask for one batch after the other; returns the seconds of each."""
    durations_s = []
    for rows in batches:
        began_s = clock()
        way.begin(question, rows)()
        durations_s.append(clock() - began_s)
    return durations_s


def ask_at_once(way: Way, question: Question, batches: Sequence[np.ndarray], most: int) -> None:
    """Ask for all batches, with at most ``most`` questions open."""
    waiting: list[Callable[[], np.ndarray]] = []
    for rows in batches:
        if len(waiting) == most:
            waiting.pop(0)()
        waiting.append(way.begin(question, rows))
    for wait in waiting:
        wait()

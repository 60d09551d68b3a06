"""Ways to the same predictions: in this process, or by the Open Inference Protocol.

Dimension letter: T rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """Asks for predictions."""

    def ask(self, question: Question, rows: np.ndarray) -> np.ndarray:
        """Return the output of rows [T, *shape]: [T, *]. Raises what its client raises."""
        ...

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """Ask beside other questions; the returned function waits for the output."""
        ...

    def close(self) -> None:
        """End all connections."""
        ...


class Local:
    """Calls functions of this process, by the models' names, one after the other."""

    def __init__(self, functions: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        self._functions = functions

    def ask(self, question: Question, rows: np.ndarray) -> np.ndarray:
        """See :class:`Way`."""
        return self._functions[question.model](rows)

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """See :class:`Way`; the output is computed at once."""
        result = self.ask(question, rows)
        return lambda: result

    def close(self) -> None:
        """There is nothing to close."""


class Grpc:
    """Asks by gRPC with binary tensors (``raw_input_contents``), over one connection."""

    def __init__(self, port: int) -> None:
        sizes = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
        options = [(name, MAX_MESSAGE_BYTES) for name in sizes]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        self._infer = stubs.GRPCInferenceServiceStub(self._channel).ModelInfer

    def ask(self, question: Question, rows: np.ndarray) -> np.ndarray:
        """See :class:`Way`."""
        return _output(self._infer(_request(question, rows), timeout=TIMEOUT_S))

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """See :class:`Way`."""
        call = self._infer.future(_request(question, rows), timeout=TIMEOUT_S)
        return lambda: _output(call.result())

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


def _request(question: Question, rows: np.ndarray) -> messages.ModelInferRequest:
    request = messages.ModelInferRequest(model_name=question.model)
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = question.input, question.datatype
    tensor.shape.extend(rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    request.outputs.add().name = question.output
    return request


def _output(reply: messages.ModelInferResponse) -> np.ndarray:
    [output], [data] = reply.outputs, reply.raw_output_contents
    return np.frombuffer(data, NUMPY_DTYPES[output.datatype]).reshape(output.shape)


class Http:
    """Asks by Triton's HTTP client, with binary tensors or with JSON.

    Questions at one time have a thread each, with a client of its own: the client's ``async_infer``
    sleeps 10 ms.
    """

    def __init__(self, port: int, connections: int, is_binary: bool) -> None:
        self._address = f"127.0.0.1:{port}"
        self._is_binary = is_binary
        self._threads = ThreadPoolExecutor(connections)
        self._own = threading.local()

    def ask(self, question: Question, rows: np.ndarray) -> np.ndarray:
        """See :class:`Way`."""
        tensor = triton.InferInput(question.input, list(rows.shape), question.datatype)
        tensor.set_data_from_numpy(rows, binary_data=self._is_binary)
        output = triton.InferRequestedOutput(question.output, binary_data=self._is_binary)
        reply = self._client().infer(question.model, [tensor], outputs=[output])
        result: np.ndarray = reply.as_numpy(question.output)
        return result

    def begin(self, question: Question, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """See :class:`Way`."""
        return self._threads.submit(self.ask, question, rows).result

    def _client(self) -> Any:
        """Return the client of this thread, to which its connections belong."""
        if not hasattr(self._own, "client"):
            self._own.client = triton.InferenceServerClient(
                self._address, network_timeout=TIMEOUT_S
            )
        return self._own.client

    def close(self) -> None:
        """End the threads; their connections end with their clients."""
        self._threads.shutdown()


def ask_in_turn(
    way: Way, question: Question, batches: Sequence[np.ndarray], clock: Callable[[], float]
) -> list[float]:
    """Ask for one batch after the other; returns the seconds of each."""
    durations_s = []
    for rows in batches:
        began_s = clock()
        way.ask(question, rows)
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

"""Sends requests over HTTP and gRPC, each on a connection of its own, and gathers what comes."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import grpc
import httpx

from cluster.errors import ExpertMeshError, UnavailableError
from router.client.types import UnreachableError
from router.client.wire import typed_error, was_connected
from router.protos import inference_pb2, inference_pb2_grpc
from tests.blackbox.asks import BROKEN, REFUSED, SAMPLING, Answer, Ask, Choice, Failure, Kind
from tests.blackbox.machines import GRPC_PORT, HTTP_PORT, Machines

GRACE_S, PATIENCE_S, AGAIN_S = 5.0, 20.0, 1.0
"""How long after a deadline a client gives up; how long a stream may take at one machine; how long
a client waits before it resumes."""
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class Clients:
    """Sends one request after another; safe for threads."""

    def __init__(self, machines: Machines) -> None:
        self._address, self._key = machines.network.address, machines.key

    def send(self, ask: Ask) -> Answer:
        """Return all that comes of a request, to its end.

        A gRPC stream that breaks is resumed at the next machine, as our own clients do.
        """
        choices = [Choice() for _ in range(ask.body["n"])]
        answer = Answer(ask, time.monotonic(), choices)
        if ask.is_http:
            self._send_http(answer)
        else:
            self._send_grpc(answer)
        answer.ended_s = time.monotonic()
        return answer

    def _headers(self, ask: Ask) -> dict[str, str]:
        return {"authorization": f"Bearer {ask.body.get('key', self._key)}"}

    def _send_http(self, answer: Answer) -> None:
        ask, machine = answer.ask, answer.ask.machines[0]
        url = f"http://{self._address(machine)}:{HTTP_PORT}/v1/completions"
        body = {name: value for name, value in ask.body.items() if name != "key"}
        body |= {"prompt": ask.prompt, "timeout_s": ask.timeout_s, "return_token_ids": True}
        if ask.is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with (
                httpx.Client(timeout=ask.timeout_s + GRACE_S, trust_env=False) as client,
                client.stream("POST", url, json=body, headers=self._headers(ask)) as reply,
            ):
                error = _read(reply, answer)
        except httpx.TransportError as lost:
            is_refused = isinstance(lost, httpx.ConnectError)
            error = {"code": REFUSED if is_refused else BROKEN, "message": repr(lost)}
        if error:
            _fail(answer, machine, answer.began_s, error)

    def _send_grpc(self, answer: Answer) -> None:
        ask = answer.ask
        resumes = ask.kind in (Kind.STREAM, Kind.RESUME, Kind.DOUBT)
        for attempt, machine in enumerate(itertools.cycle(ask.machines)):
            answer.has_failed = False
            error = self._attempt(answer, machine, 0 if attempt else ask.leaves_after)
            is_whole = all(choice.finish_reason for choice in answer.choices)
            is_temporary = error is None or isinstance(error, UnavailableError)
            is_late = time.monotonic() + AGAIN_S > answer.began_s + ask.timeout_s
            if is_whole or is_late or not (is_temporary and resumes):
                return
            threading.Event().wait(AGAIN_S)
            for choice in answer.choices if ask.kind is Kind.DOUBT else []:
                if choice.token_ids and not choice.finish_reason:
                    choice.doubted = True
                    choice.told.append((len(choice.token_ids), False))

    def _attempt(self, answer: Answer, machine: int, leaves_after: int) -> ExpertMeshError | None:
        """Ask one machine; returns the error, which is a failure of the answer too."""
        ask, began_s = answer.ask, time.monotonic()
        address, left_s = f"{self._address(machine)}:{GRPC_PORT}", _left_s(answer)
        with grpc.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            method = stub.GenerateStream if ask.is_streamed else stub.Generate.future
            given = {"timeout": left_s + GRACE_S, "metadata": [*self._headers(ask).items()]}
            call = method(_message(answer), **given)
            patience = threading.Timer(PATIENCE_S, call.cancel if ask.is_streamed else int)
            patience.start()
            try:
                for message in call if ask.is_streamed else [call.result()]:
                    for choice in (message, *message.other_choices):
                        _take(choice, answer)
                    if 0 < leaves_after <= answer.num_tokens:
                        return None
            except grpc.RpcError as error:
                if call.cancelled():  # by this client's patience
                    return None
                typed = typed_error(error, address)
                told = {"code": typed.code.value, "param": typed.field, "message": typed.message}
                if isinstance(typed, UnreachableError):
                    told["code"] = BROKEN if was_connected(error) else REFUSED
                _fail(answer, machine, began_s, told)
                return typed
            finally:
                patience.cancel()
                call.cancel()
        return None


def _left_s(answer: Answer) -> float:
    return max(answer.began_s + answer.ask.timeout_s - time.monotonic(), 1e-3)


def _fail(answer: Answer, machine: int, began_s: float, error: Mapping[str, Any]) -> None:
    answer.has_failed = True
    told = error["code"], error.get("param") or "", error["message"]
    answer.failures.append(Failure(machine, began_s, time.monotonic(), *told))


def _message(answer: Answer) -> Any:
    """Return the message of the next attempt, with what has come so far."""
    ask = answer.ask
    message = inference_pb2.GenerateRequest(
        model=ask.body["model"],
        sampling={name: ask.body[name] for name in SAMPLING if ask.body[name] is not None},
        timeout_s=_left_s(answer),
        on_expert_loss=ask.body["on_expert_loss"],
    )
    message.prompt_token_ids.ids.extend(ask.prompt)
    for choice in answer.choices if answer.num_tokens else []:
        resumed = message.resume.add(token_ids=choice.token_ids, identity=choice.identity)
        resumed.finished = choice.finish_reason is not None
        resumed.inexact = not all(exact for _, exact in choice.told)
    return message


def _take(message: Any, answer: Answer) -> None:
    """Add a message of gRPC; raises ``ValueError`` for a second identity."""
    choice, identity = answer.choices[message.index], message.identity
    logprobs = [row.logprob for row in message.logprobs]
    choice.add(message.token_ids, logprobs, message.text, message.exact, message.finish_reason)
    if identity and choice.identity not in ("", identity):
        raise ValueError(f"a choice is of {choice.identity} and of {identity}")
    choice.identity = identity or choice.identity
    if message.HasField("usage"):
        answer.usage = tuple(getattr(message.usage, name) for name in USAGE)


def _read(reply: httpx.Response, answer: Answer) -> Mapping[str, Any] | None:
    """Add an answer of HTTP, or all events of a stream; returns the error that ended it."""
    if "event-stream" not in reply.headers.get("content-type", ""):
        return _add(json.loads(reply.read()), answer)
    error: Mapping[str, Any] | None = None
    for line in filter(None, reply.iter_lines()):
        if line == "data: [DONE]":
            return error
        error = _add(json.loads(line.removeprefix("data: ")), answer) or error
    return {"code": BROKEN, "message": "the stream ended before [DONE]"}


def _add(body: dict[str, Any], answer: Answer) -> Mapping[str, Any] | None:
    for told in body.get("choices", ()):
        logprobs = (told["logprobs"] or {}).get("token_logprobs", ())
        more = logprobs, told["text"], told.get("exact"), told["finish_reason"]
        answer.choices[told["index"]].add(told.get("token_ids", ()), *more)
    if usage := body.get("usage"):
        answer.usage = tuple(usage[name] for name in USAGE)
    error: Mapping[str, Any] | None = body.get("error")
    return error

"""Sends requests over HTTP and gRPC, each on a connection of its own, and gathers what comes.

A gRPC stream that breaks is resumed at the next machine, as our own clients do.
"""

from __future__ import annotations

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
from tests.blackbox.answers import BROKEN, REFUSED, Answer, Choice, Failure, Piece
from tests.blackbox.asks import Ask, Kind
from tests.blackbox.machines import GRPC_PORT, HTTP_PORT, Machines

GRACE_S, PATIENCE_S, AGAIN_S = 5.0, 20.0, 1.0
"""How long after a deadline a client gives up; how long a stream may take at one machine; how long
a client waits before it resumes."""
COMMON = ("temperature", "max_tokens", "seed", "n", "logprobs", "ignore_eos")


class Clients:
    """Sends one request after another; safe for threads."""

    def __init__(self, machines: Machines) -> None:
        self._address, self._key = machines.network.address, machines.key

    def send(self, ask: Ask) -> Answer:
        """Return all that comes of a request, to its end."""
        answer = Answer(ask, time.monotonic(), choices=[Choice() for _ in range(ask.n)])
        if ask.is_http:
            self._send_http(answer)
        elif ask.is_streamed:
            self._stream(answer)
        else:
            self._attempt(answer, 0)
        answer.ended_s = time.monotonic()
        return answer

    def _headers(self, ask: Ask) -> dict[str, str]:
        has_wrong_key = ask.mistake is not None and ask.mistake.field == "key"
        return {"authorization": f"Bearer {ask.value('key') if has_wrong_key else self._key}"}

    def _send_http(self, answer: Answer) -> None:
        ask, began_s = answer.ask, time.monotonic()
        machine = ask.machines[0]
        url = f"http://{self._address(machine)}:{HTTP_PORT}/v1/completions"
        body = {name: ask.value(name) for name in (*COMMON, "model", "on_expert_loss")}
        body |= {"prompt": ask.prompt, "timeout_s": ask.timeout_s, "return_token_ids": True}
        if ask.is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with (
                httpx.Client(timeout=ask.timeout_s + GRACE_S, trust_env=False) as client,
                client.stream("POST", url, json=body, headers=self._headers(ask)) as reply,
            ):
                if "event-stream" in reply.headers.get("content-type", ""):
                    error = _read_events(reply, answer)
                else:
                    reply.read()
                    error = _read_body(reply.json(), answer)
        except httpx.ConnectError as lost:
            error = {"code": REFUSED, "message": repr(lost)}
        except httpx.TransportError as lost:
            error = {"code": BROKEN, "message": repr(lost)}
        if error:
            _fail(answer, machine, began_s, error)

    def _stream(self, answer: Answer) -> None:
        deadline_s, attempt = answer.began_s + answer.ask.timeout_s, 0
        while True:
            answer.has_failed = False
            error = self._attempt(answer, attempt)
            all_ended = all(choice.finish_reason for choice in answer.choices)
            is_temporary = error is None or isinstance(error, UnavailableError)
            remaining_s = deadline_s - time.monotonic()
            if all_ended or not is_temporary or remaining_s < AGAIN_S or _is_hasty(answer):
                return
            attempt += 1
            threading.Event().wait(AGAIN_S)
            if answer.ask.kind is Kind.DOUBT:
                _doubt(answer)

    def _attempt(self, answer: Answer, attempt: int) -> ExpertMeshError | None:
        """Ask one machine over gRPC; returns the error, which is a failure of the answer too."""
        ask, began_s = answer.ask, time.monotonic()
        machine = ask.machines[attempt % len(ask.machines)]
        address = f"{self._address(machine)}:{GRPC_PORT}"
        remaining_s = answer.began_s + ask.timeout_s - began_s
        left = threading.Event()
        with grpc.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            method = stub.GenerateStream if ask.is_streamed else stub.Generate
            call = _call(method, _message(answer, remaining_s), remaining_s, self._headers(ask))

            def leave() -> None:
                left.set()
                call.cancel()

            timer = threading.Timer(PATIENCE_S, leave)
            try:
                if ask.is_streamed:
                    timer.start()
                    for message in call:
                        _take(message, answer)
                        if attempt == 0 and 0 < ask.leaves_after <= answer.num_tokens:
                            leave()
                else:
                    message = call.result()
                    for choice in (message, *message.other_choices):
                        _take(choice, answer)
            except grpc.RpcError as error:
                if left.is_set():
                    return None
                typed = typed_error(error, address)
                code: str = typed.code.value
                if isinstance(typed, UnreachableError):
                    code = BROKEN if was_connected(error) else REFUSED
                told = {"code": code, "param": typed.field, "message": str(typed)}
                _fail(answer, machine, began_s, told)
                return typed
            finally:
                timer.cancel()
        return None


def _call(method: Any, message: Any, timeout_s: float, headers: Mapping[str, str]) -> Any:
    start = method.future if hasattr(method, "future") else method
    return start(message, timeout=timeout_s + GRACE_S, metadata=tuple(headers.items()))


def _is_hasty(answer: Answer) -> bool:
    return answer.ask.kind in (Kind.HASTY, Kind.WRONG)


def _doubt(answer: Answer) -> None:
    """Say of every choice that has begun that it is not exact."""
    for choice in answer.choices:
        if choice.token_ids and choice.finish_reason is None and choice.doubted is None:
            choice.doubted = len(choice.pieces)


def _fail(answer: Answer, machine: int, began_s: float, error: Mapping[str, Any]) -> None:
    answer.has_failed = True
    param, now_s = error.get("param") or "", time.monotonic()
    answer.failures.append(
        Failure(machine, began_s, now_s, error["code"], param, error["message"])
    )


def _message(answer: Answer, timeout_s: float) -> Any:
    """Return the message of the next attempt, with what has come so far."""
    ask = answer.ask
    given = {name: ask.value(name) for name in COMMON if ask.value(name) is not None}
    message = inference_pb2.GenerateRequest(
        model=ask.value("model"),
        sampling=given,
        timeout_s=max(timeout_s, 1e-3),
        on_expert_loss=ask.value("on_expert_loss"),
    )
    message.prompt_token_ids.ids.extend(ask.prompt)
    if answer.num_tokens:
        message.resume.extend(
            inference_pb2.ResumedChoice(
                token_ids=choice.token_ids,
                finished=choice.finish_reason is not None,
                inexact=choice.is_inexact or choice.doubted is not None,
                identity=next(iter(choice.identities), ""),
            )
            for choice in answer.choices
        )
    return message


def _take(message: Any, answer: Answer) -> None:
    """Add a message of gRPC."""
    choice = answer.choices[message.index]
    logprobs = tuple(row.logprob for row in message.logprobs)
    choice.pieces.append(Piece(tuple(message.token_ids), logprobs, message.text, message.exact))
    choice.finish_reason = message.finish_reason or choice.finish_reason
    choice.identities |= {message.identity} - {""}
    if message.HasField("usage"):
        usage = message.usage
        answer.usage = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def _read_body(body: Mapping[str, Any], answer: Answer) -> Mapping[str, Any] | None:
    """Add an answer or an event of HTTP; returns its error."""
    if "error" in body:
        return dict(body["error"])
    for told in body["choices"]:
        choice = answer.choices[told["index"]]
        logprobs = tuple((told.get("logprobs") or {}).get("token_logprobs", ()))
        piece = Piece(tuple(told.get("token_ids", ())), logprobs, told["text"], told.get("exact"))
        choice.pieces.append(piece)
        choice.finish_reason = told["finish_reason"] or choice.finish_reason
    if usage := body.get("usage"):
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        answer.usage = tuple(usage[name] for name in names)
    return None


def _read_events(reply: httpx.Response, answer: Answer) -> Mapping[str, Any] | None:
    """Add all events of a stream; returns the error that ended it."""
    error: Mapping[str, Any] | None = None
    for line in reply.iter_lines():
        if line == "data: [DONE]":
            return error
        if line:
            error = _read_body(json.loads(line.removeprefix("data: ")), answer) or error
    return {"code": BROKEN, "message": "the stream ended before [DONE]"}

"""``expertmesh chat`` against a real gRPC server with a scripted upstream."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cluster.errors import UnavailableError
from router.cli.app import app
from router.cli.chat import Conversation, _Chat
from router.client import Message, Reply
from router.messages.request import GenerationRequest
from tests.unit.gateway_fakes import CONTEXT, FakeUpstream, says, tokenizer
from tests.unit.terminal import Terminal


def chat(address: str, text: str | bytes, *options: str) -> Result:
    return CliRunner().invoke(app, ["chat", "--address", address, *options], input=text)


def prompt(request: GenerationRequest) -> str:
    return tokenizer().decode(request.prompt_token_ids)


def test_each_line_is_answered_with_all_that_was_said(address: str, upstream: FakeUpstream) -> None:
    result = chat(address, "in\n\n  the end \n", "--system", "be brief", "--max-tokens", "9")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "was the word\nwas the word\n"
    first, second = upstream.requests
    assert prompt(first) == "system: be brief\nuser: in\nassistant:"
    assert prompt(second) == (
        "system: be brief\nuser: in\nassistant: was the word\nuser: the end\nassistant:"
    )
    assert first.sampling.max_tokens == 9


def test_its_options_reach_the_server(address: str, upstream: FakeUpstream) -> None:
    options = {"--temperature": 0.5, "--top-p": 0.9, "--top-k": 3, "--seed": 7, "--model": "tiny"}
    flat = [str(one) for pair in options.items() for one in pair]
    assert chat(address, "in", *flat, "--stop", "word").stdout == "was the \n"
    sampling = upstream.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 3)
    assert (sampling.seed, sampling.max_tokens) == (7, CONTEXT // 2)


def test_what_no_longer_fits_is_forgotten_and_said(address: str, upstream: FakeUpstream) -> None:
    questions = ["in the beginning", "the word", "the end", "stop here"]
    result = chat(address, "\n".join(questions), "--system", "be", "--max-tokens", "24")
    assert result.exit_code == 0
    assert result.stdout == "was the word\n" * 4
    told = "the oldest exchange is forgotten: the context has no room for more\n"
    assert result.stderr == told * 2
    *_, last = upstream.requests
    assert len(upstream.requests) == 4
    assert prompt(last).startswith("system: be\nuser: the end\n")
    assert len(last.prompt_token_ids) + 24 <= CONTEXT


def test_a_question_that_never_fits_is_refused_and_nothing_is_forgotten(address: str) -> None:
    result = chat(address, "in\n" + "beginning " * 99, "--max-tokens", "8")
    assert (result.exit_code, result.stdout) == (1, "was the word\n")
    assert result.stderr.startswith("expertmesh: messages: ")
    assert result.stderr.count("\n") == 1


def test_no_room_at_all_is_the_servers_to_refuse(address: str) -> None:
    result = chat(address, "in", "--max-tokens", "0")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "sampling.max_tokens: must be an integer from 1 to 64; got 0" in result.stderr


def test_commands_begin_with_a_slash(address: str, upstream: FakeUpstream) -> None:
    result = chat(address, "in\n/reset\n//the\n/what now\n/help\n/quit\nnever asked")
    assert (result.exit_code, result.stdout) == (0, "was the word\n" * 2)
    assert [prompt(one) for one in upstream.requests] == [
        "user: in\nassistant:",
        "user: /the\nassistant:",
    ]
    assert "the conversation is forgotten" in result.stderr
    assert "there is no /what" in result.stderr
    assert "Ctrl-D" in result.stderr


def test_in_a_pipe_the_first_failure_ends_it(address: str, upstream: FakeUpstream) -> None:
    upstream.script = lambda request: [UnavailableError("away", retry_after_s=900)]
    result = chat(address, "in\nthe", "--timeout", "5")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "expertmesh: away\n")
    assert len(upstream.requests) == 1
    result = chat(address, "in", "--model", "bare")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr
    assert chat("127.0.0.1:1", "in").exit_code == 3
    result = chat(address, b"\xff\xfe\n")
    assert (result.exit_code, result.stderr) == (2, "expertmesh: stdin is not UTF-8 text\n")


def test_a_conversation_forgets_its_oldest_exchanges_only() -> None:
    conversation = Conversation("be brief")
    for question in "abc":
        conversation.add(question, f" {question}! ")
    system, rest = Message("system", "be brief"), [Message("user", "d")]
    assert conversation.messages("d", num_forgotten=2) == [
        system, Message("user", "c"), Message("assistant", "c!"), *rest
    ]  # fmt: skip
    conversation.forget(1)
    assert len(conversation) == 2
    assert conversation.messages("d")[1] == Message("user", "b")
    assert Conversation().messages("d") == rest


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_command(address: str, upstream: FakeUpstream) -> None:
    upstream.endless = True  # after these words, which are not the end of the answer
    upstream.script = says(" was \x1b[2J", finish_reason=None)
    terminal = Terminal("chat", "--address", address)
    terminal.wait_for("you>")
    terminal.type("in\n")
    terminal.wait_for("was \N{REPLACEMENT CHARACTER}[2J")
    terminal.interrupt("(stopped)")
    assert upstream.closed.wait(10)
    terminal.wait_for("you>")
    terminal.interrupt("you>")  # at the prompt it only gives a new one
    upstream.script = lambda request: [UnavailableError("away", retry_after_s=900)]
    terminal.type("the\n")
    terminal.wait_for("away")
    terminal.wait_for("; ask again")
    terminal.wait_for("you>")
    upstream.script = says(" the word")
    terminal.type("the end\n")
    terminal.wait_for("the word")
    terminal.wait_for("you>")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert prompt(upstream.requests[-1]) == (
        "user: in\nassistant: was \x1b[2J\nuser: the end\nassistant:"
    )


def test_ctrl_c_never_breaks_off_the_client_between_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grpc's blocking client would keep a lock there, and the next answer would never come."""
    released = []

    async def ask(messages: list[Message]) -> AsyncGenerator[Reply, None]:
        yield Reply(0, " was", (1,), (), None, True, None)
        signal.raise_signal(signal.SIGINT)
        released.append("lock")
        await asyncio.sleep(60)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = iter(["in", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    conversation = Conversation()
    with asyncio.Runner() as runner:
        _Chat(runner, ask, conversation, "tiny").run()
    assert released == ["lock"]
    assert "(stopped)" in capsys.readouterr().out
    assert conversation.messages("on")[1] == Message("assistant", "was")

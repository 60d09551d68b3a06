"""``expertmesh chat``: a conversation whose answers appear piece by piece."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.errors import ExpertMeshError, InvalidRequestError
from router.cli.common import (
    BAD_USAGE,
    Address,
    ApiKey,
    Model,
    Seed,
    Stop,
    Temperature,
    Timeout,
    TopK,
    TopP,
    fail,
    write,
    write_generated,
)
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, AsyncClient, Message, Reply, Sampling
from router.client.wire import first_model

ROOM_TOKENS = 256
_TOO_LONG_FIELDS = ("messages", "sampling.max_tokens")
"""The fields of a server's error when conversation and answer exceed the context."""
_HELP = """\
/reset  forget the conversation; the system prompt stays
/quit   leave, as Ctrl-D does
/help   show these lines
//text  say a text that begins with /
Ctrl-C ends an answer; the text up to there counts as the answer."""

Ask = Callable[[list[Message]], AsyncGenerator[Reply, None]]


def chat(
    system: Annotated[str, typer.Option(help="A system prompt; it is never forgotten.")] = "",
    model: Model = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of an answer, reserved in the context; by default "
            f"{ROOM_TOKENS}, or half the context where that is less."
        ),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Talk with a model that has a chat template.

    Example: expertmesh chat --system "Answer as a prophet would." --temperature 0.8

    Each token is the likeliest one, unless --temperature, --top-p or --top-k asks for a draw.

    The command forgets the oldest exchanges that the context has no room for, and says how many.
    When stdin is no terminal, each of its lines is a question, stdout has only the answers, and
    the first failure ends the command.
    """
    # Ctrl-C raises an error at any place of grpc's blocking client, which then may hold a lock for
    # ever. In an event loop it cancels a task.
    with asyncio.Runner() as runner:
        client = runner.run(_opened(address, api_key))
        info = first_model(runner.run(client.model_info(model)))
        if max_tokens is None:
            max_tokens = min(ROOM_TOKENS, info.max_model_len // 2)
        if temperature is None and top_p is None and top_k is None:
            temperature = 0.0
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop or (),
        )

        def ask(messages: list[Message]) -> AsyncGenerator[Reply, None]:
            return client.stream(
                messages=messages, sampling=sampling, model=info.id, timeout_s=timeout
            )

        _Chat(runner, ask, Conversation(system), info.id).run()
        runner.run(client.close())


async def _opened(address: str, api_key: str | None) -> AsyncClient:
    return AsyncClient(address, api_key=api_key)


class _Chat:
    """The loop of questions and answers, at a terminal or in a pipe."""

    def __init__(
        self, runner: asyncio.Runner, ask: Ask, conversation: Conversation, model: str
    ) -> None:
        self._runner, self._ask = runner, ask
        self._conversation = conversation
        self._model = model
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(stderr=not self._is_terminal, highlight=False)

    def run(self) -> None:
        """Answer each line until the input ends or /quit."""
        if self._is_terminal:
            self._note(f"{self._model}; /help lists the commands, Ctrl-D leaves")
        for line in self._lines():
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            elif text:
                self._answer(text.removeprefix("/"))

    def _lines(self) -> Iterator[str]:
        if not self._is_terminal:
            try:
                yield from sys.stdin
            except UnicodeDecodeError:
                fail("stdin is not UTF-8 text", BAD_USAGE)
            return
        with suppress(ImportError):
            import readline  # noqa: F401 - editing and history for input()
        while True:
            try:
                yield input(self._prompt())
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")

    def _prompt(self) -> str:
        if self._notes.color_system is None:
            return "you> "
        # The marks \001 and \002 keep readline from counting the colours as columns.
        return "\001\033[1;36m\002you>\001\033[0m\002 "

    def _command(self, text: str) -> None:
        if text == "/reset":
            self._conversation.forget(len(self._conversation))
            self._note("the conversation is forgotten")
        elif text == "/help":
            self._note(_HELP)
        else:
            self._note(f"there is no {text.split()[0]}; /help lists the commands")

    def _answer(self, question: str) -> None:
        try:
            answer = self._fitting_answer(question)
        except ExpertMeshError as error:
            if not self._is_terminal:
                raise
            self._notes.print(f"[red]{escape(str(error))}[/]; ask again", soft_wrap=True)
        else:
            if answer:
                self._conversation.add(question, answer)

    def _fitting_answer(self, question: str) -> str:
        """Ask with the newest exchanges that fit; return the answer, as far as it came."""
        num_forgotten = 0
        while True:
            try:
                return self._stream(question, num_forgotten)
            except InvalidRequestError as error:
                if error.field not in _TOO_LONG_FIELDS or num_forgotten == len(self._conversation):
                    raise
                num_forgotten += 1

    def _stream(self, question: str, num_forgotten: int) -> str:
        texts: list[str] = []

        async def show() -> None:
            asked = self._ask(self._conversation.messages(question, num_forgotten))
            async with aclosing(asked) as pieces:
                async for piece in pieces:
                    if not texts:
                        self._begin(num_forgotten)
                    texts.append(piece.text if any(texts) else piece.text.lstrip())
                    write_generated(texts[-1])

        try:
            self._runner.run(show())
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            texts.append("")
            self._note(" (stopped)", end="")
        finally:
            if texts:
                write("\n")
        return "".join(texts)

    def _begin(self, num_forgotten: int) -> None:
        """Begin an answer: report the forgotten exchanges, print the model's name."""
        if num_forgotten:
            self._conversation.forget(num_forgotten)
            exchanges = "exchange is" if num_forgotten == 1 else f"{num_forgotten} exchanges are"
            self._note(f"the oldest {exchanges} forgotten: the context has no room for more")
        if self._is_terminal:
            self._notes.print(f"[bold green]{escape(self._model)}>[/] ", end="")

    def _note(self, text: str, end: str = "\n") -> None:
        self._notes.print(f"[dim]{escape(text)}[/]", end=end, soft_wrap=True)


class Conversation:
    """A system prompt and the exchanges so far, each a question and its answer."""

    def __init__(self, system: str = "") -> None:
        self._system = [Message("system", system)] if system else []
        self._exchanges: list[tuple[str, str]] = []

    def __len__(self) -> int:
        """Return the number of exchanges."""
        return len(self._exchanges)

    def messages(self, question: str, num_forgotten: int = 0) -> list[Message]:
        """Return the messages of a request, without the ``num_forgotten`` oldest exchanges."""
        messages = list(self._system)
        for earlier_question, answer in self._exchanges[num_forgotten:]:
            messages += [Message("user", earlier_question), Message("assistant", answer)]
        return [*messages, Message("user", question)]

    def forget(self, count: int) -> None:
        """Forget the ``count`` oldest exchanges; the system prompt stays."""
        del self._exchanges[:count]

    def add(self, question: str, answer: str) -> None:
        """Remember an exchange."""
        # Chat templates write a space before a text, and so do models.
        self._exchanges.append((question, answer.strip()))

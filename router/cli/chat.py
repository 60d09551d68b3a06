"""``expertmesh chat``: a conversation, answered as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.errors import ExpertMeshError, InvalidRequestError
from router.cli.common import (
    BAD_USAGE,
    Address,
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
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client, Message, Reply, Sampling

ROOM_TOKENS = 256
_TOO_LONG_FIELDS = ("messages", "sampling.max_tokens")
"""What the server names when a conversation and the room for its answer exceed the context."""
_HELP = """\
/reset  forget the conversation; the system prompt stays
/quit   leave, as Ctrl-D does
/help   show this
//text  say a text that begins with /
Ctrl-C ends an answer; what has come of it counts as the answer."""

Ask = Callable[[list[Message]], Generator[Reply, None, None]]


def chat(
    system: Annotated[str, typer.Option(help="A system prompt; it is never forgotten.")] = "",
    model: Model = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of an answer, for which room is kept; by default "
            f"{ROOM_TOKENS}, or half the context where that is less."
        ),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Talk with a model that has a chat template.

    Example: expertmesh chat --system "Answer as a prophet would." --temperature 0.8

    Where question, history and room for the answer exceed the context, the oldest exchanges are
    forgotten, and it is said how many. When stdin is no terminal each of its lines is a question,
    only answers are printed, and the first failure ends the command.
    """
    with Client(address) as client:
        info = client.model_info(model)[0]
        if max_tokens is None:
            max_tokens = min(ROOM_TOKENS, info.max_model_len // 2)
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop or (),
        )

        def ask(messages: list[Message]) -> Generator[Reply, None, None]:
            return client.stream(
                messages=messages, sampling=sampling, model=info.id, timeout_s=timeout
            )

        _Chat(ask, Conversation(system), info.id).run()


class _Chat:
    """The loop of questions and answers, at a terminal or in a pipe."""

    def __init__(self, ask: Ask, conversation: Conversation, model: str) -> None:
        self._ask = ask
        self._conversation = conversation
        self._model = model
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(stderr=not self._is_terminal, highlight=False)

    def run(self) -> None:
        """Answer line after line until the input ends or /quit."""
        if self._is_terminal:
            self._note(f"{self._model}; /help tells what else there is, Ctrl-D leaves")
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
        # The marks keep readline from counting the colours as columns.
        return "\001\033[1;36m\002you>\001\033[0m\002 "

    def _command(self, text: str) -> None:
        if text == "/reset":
            self._conversation.forget(len(self._conversation))
            self._note("the conversation is forgotten")
        elif text == "/help":
            self._note(_HELP)
        else:
            self._note(f"there is no {text.split()[0]}; /help tells what there is")

    def _answer(self, question: str) -> None:
        try:
            answer = self._fitting_answer(question)
        except ExpertMeshError as error:
            if not self._is_terminal:
                raise
            self._notes.print(f"[red]{escape(str(error))}[/]; ask again", soft_wrap=True)
        else:
            if answer:
                self._conversation.answered(question, answer)

    def _fitting_answer(self, question: str) -> str:
        """Ask with as much of the conversation as fits; returns the answer as far as it came."""
        without = 0
        while True:
            try:
                return self._stream(question, without)
            except InvalidRequestError as error:
                if error.field not in _TOO_LONG_FIELDS or without == len(self._conversation):
                    raise
                without += 1

    def _stream(self, question: str, without: int) -> str:
        answer, begun = "", False
        with closing(self._ask(self._conversation.asking(question, without))) as pieces:
            try:
                for piece in pieces:
                    if not begun:
                        begun = True
                        self._begin(without)
                    new = piece.text if answer else piece.text.lstrip()
                    answer += new
                    write_generated(new)
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                begun = True
                self._note(" (stopped)", end="")
            finally:
                if begun:
                    write("\n")
        return answer

    def _begin(self, forgotten: int) -> None:
        """Say what an accepted question has cost, and who speaks."""
        if forgotten:
            self._conversation.forget(forgotten)
            these = "exchange is" if forgotten == 1 else f"{forgotten} exchanges are"
            self._note(f"the oldest {these} forgotten: the context has no room for more")
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

    def asking(self, question: str, without: int = 0) -> list[Message]:
        """Return the messages to send with a question, ``without`` so many of the oldest."""
        messages = list(self._system)
        for asked, answered in self._exchanges[without:]:
            messages += [Message("user", asked), Message("assistant", answered)]
        return [*messages, Message("user", question)]

    def forget(self, count: int) -> None:
        """Forget the ``count`` oldest exchanges; the system prompt stays."""
        del self._exchanges[:count]

    def answered(self, question: str, answer: str) -> None:
        """Remember an exchange."""
        # A template puts its own space before a text; models write theirs first, too.
        self._exchanges.append((question, answer.strip()))

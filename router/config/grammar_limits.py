"""The limits of grammars, for the gateway that checks them and the router that follows them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

FIELD = "structured_outputs"
"""The field that an error of a grammar names where the client's own name is not known."""

STACK_BYTES = 128 << 20
"""The stack of a thread that compiles grammars. llguidance compiles rules and references by
recursion, without a limit of their depth; one that overflows its stack ends the process. Grammars
of the largest size need less than 16 MiB; memory that is not used is only reserved."""

_STARTING = threading.Lock()
"""The size of stacks is the process's: two checks at once would take each other's."""


def grammar_pool() -> ThreadPoolExecutor:
    """Return a pool of one thread, whose stack is large enough for every grammar."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")
    with _large_stack():
        pool.submit(int).result()  # the thread starts at its first work
    return pool


def start_grammar_thread(target: Callable[[], None]) -> None:
    """Start a thread with such a stack, which does not hold up the end of the process."""
    with _large_stack():
        threading.Thread(target=target, name="grammars", daemon=True).start()


@contextmanager
def _large_stack() -> Iterator[None]:
    with _STARTING:
        usual = threading.stack_size(STACK_BYTES)
        try:
            yield
        finally:
            threading.stack_size(usual)


def parser_limits() -> LLParserLimits:
    """Return the limits of one grammar; one that takes more is in error.

    Its compilation takes some 20 ms, and a token of one regular expression some 10 ms. A token of a
    grammar with hundreds of rules that may all come next can take a second.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )

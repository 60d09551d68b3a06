"""The limits of grammars, for the gateway that checks them and the router that follows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

FIELD = "structured_outputs"
"""The field that an error of a grammar names where the client's own name is not known."""


def parser_limits() -> LLParserLimits:
    """Return the limits of one grammar: its compilation takes some 20 ms, and a token some 10 ms.

    A grammar that takes more is in error.
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

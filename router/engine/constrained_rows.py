"""Which tokens grammars forbid in the rows of a step.

Dimension letters: G rows with a grammar, W words of 32 bits with a bit for each token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cluster.errors import ExpertMeshError, InvalidRequestError
from router.config.grammar_limits import FIELD
from router.engine.constraints import Grammars
from router.engine.sequence import Sequence as Choice
from router.engine.token_masks import Mask, words_of
from router.engine.token_rules import rules_of

MAX_WAIT_S = 0.02
"""How long a step waits for its matchers. A choice whose matcher takes longer is recomputed in the
next step, so that it does not hold up the others."""


class Forbidden(NamedTuple):
    """The tokens that grammars forbid in some rows of a step."""

    rows: torch.Tensor
    """int64 [G]."""
    words: torch.Tensor
    """int32 [G, W]: a bit for each token, 0 for one that is forbidden."""


def barred() -> InvalidRequestError:
    """Return the error of a choice for which no token may come next."""
    return InvalidRequestError(
        "bad_words, min_tokens or logit_bias exclude every token that the grammar allows here",
        FIELD,
    )


def begin_rules(choice: Choice, ends: Iterable[int], grammars: Grammars | None) -> None:
    """Give a choice its request's rules and grammar; ``ends`` are the model's ends of text."""
    sampling = choice.request.sampling
    choice.rules = rules_of(choice.request, ends)
    if not sampling.grammar or choice.wants_no_tokens:
        return
    if grammars is None:
        raise InvalidRequestError("this router has no vocabulary for grammars", FIELD)
    choice.constraint = grammars.begin(sampling.grammar, sampling.grammar_marks)


ToDevice = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]
"""Copies tensors of the host to the logits' device."""


def forbidden_of(sampled: Sequence[Choice], to_device: ToDevice) -> Forbidden | None:
    """Return what grammars forbid in a step's rows, ``None`` if it is known for no row.

    Waits at most :data:`MAX_WAIT_S` for all rows. A choice whose matcher takes longer is
    ``deferred``; a later step does not wait for it beside other choices. A choice whose grammar
    fails gets its ``failure``.
    """
    until_s = time.monotonic() + MAX_WAIT_S
    waits_again = all(choice.deferred for choice in sampled)
    rows: list[int] = []
    masks: list[Mask] = []
    for row, choice in enumerate(sampled):
        was_deferred, choice.deferred = choice.deferred, False
        if choice.constraint is None:
            continue
        try:
            is_waited_for = waits_again or not was_deferred
            wait_s = until_s - time.monotonic() if is_waited_for else 0.0
            found = choice.constraint.allowed(wait_s)
        except ExpertMeshError as error:
            choice.failure = error
            continue
        choice.deferred = found is None
        if found is not None:
            rows.append(row)
            masks.append(found)
    if not rows:
        return None
    words = torch.from_numpy(words_of(masks))
    return Forbidden(*to_device(torch.from_numpy(np.array(rows)), words))

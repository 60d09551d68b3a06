"""Multiple-choice questions, scored by the log-likelihood of each choice after its context.

The rules are those of lm-evaluation-harness (EleutherAI): a space stands between context and
choice; ``acc`` takes the choice of the largest log-likelihood, ``acc_norm`` that of the largest
log-likelihood for each character of the choice; of equal ones the first.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ConfigError
from router.gateway.tokenizer import Tokenizer
from router.workshop.evaluate.scores import Scored, Scorer
from router.workshop.texts import check_ids

DELIMITER = " "
SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a file; ``answer`` is the index of the right choice."""

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str
    """The file and line, for errors."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """A choice after its context: the ids of both, of which the last ``count`` are the choice's."""

    ids: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True)
class ChoiceFigures:
    """The figures of a file; each has the standard error of a mean beside it."""

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    exact: bool


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file: an object with ``context``, ``choices`` and ``answer`` in each line.

    Other keys are ignored, and empty lines too. Raises ``ConfigError`` with file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot be read as UTF-8 text: {error.reason}", str(path)) from None
    questions = [
        _question(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not questions:
        raise ConfigError("has no questions", str(path))
    return questions


def _question(line: str, where: str) -> Question:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", where) from None
    if not isinstance(found, dict):
        raise ConfigError("must be an object with context, choices and answer", where)
    context, choices, answer = (found.get(name) for name in ("context", "choices", "answer"))
    if not isinstance(context, str):
        raise ConfigError(_wrong(context, "a text"), f"{where}: context")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ConfigError(_wrong(choices, "at least two texts, none empty"), f"{where}: choices")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        allowed = f"the index of a choice, 0 to {len(choices) - 1}"
        raise ConfigError(_wrong(answer, allowed), f"{where}: answer")
    return Question(context, tuple(choices), answer, where)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _wrong(value: Any, allowed: str) -> str:
    given = "nothing" if value is None else json.dumps(value)[:SHOWN_CHARS]
    return f"given {given}, must be {allowed}"


def continuations(
    questions: Iterable[Question],
    tokenizer: Tokenizer,
    vocab_size: int,
    context_tokens: int,
) -> list[list[Continuation]]:
    """Return the choices of each question as ids.

    An empty context is the tokenizer's :attr:`Tokenizer.prefix_id`. ``context_tokens`` is the
    model's context. Raises ``ConfigError`` for a question that is longer,
    and for a choice that has no token of its own.
    """
    whole: list[list[Continuation]] = []
    for question in questions:
        found = [_continuation(question, text, tokenizer) for text in question.choices]
        for each in found:
            check_ids(each.ids, vocab_size, question.where)
            if len(each.ids) > context_tokens:
                raise ConfigError(
                    f"has {len(each.ids)} tokens with a choice; the context of the model is "
                    f"{context_tokens}",
                    question.where,
                )
            if each.count < 1 or each.count == len(each.ids):
                raise ConfigError("has a choice without a token after the context", question.where)
        whole.append(found)
    return whole


def _continuation(question: Question, choice: str, tokenizer: Tokenizer) -> Continuation:
    context = question.context.rstrip()
    text = question.context[len(context) :] + DELIMITER + choice
    if question.context:
        whole = tokenizer.encode(context + text)
        return Continuation(tuple(whole), len(whole) - len(tokenizer.encode(context)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.prefix_id is None:
        return Continuation(tuple(ids), len(ids) - 1)
    whole = ids if ids[:1] == [tokenizer.prefix_id] else [tokenizer.prefix_id, *ids]
    return Continuation(tuple(whole), len(whole) - 1)


def score_choices(
    questions: Sequence[Question],
    asked: Sequence[Sequence[Continuation]],
    scorer: Scorer,
    on_question: Callable[[], None],
) -> ChoiceFigures:
    """Score all questions; ``asked`` are their choices by :func:`continuations`."""
    scores = scorer.score(each.ids for choices in asked for each in choices)
    right: list[bool] = []
    right_norm: list[bool] = []
    exact = True
    for question, choices in zip(questions, asked, strict=True):
        found = list(_likelihoods(choices, scores))
        exact = exact and all(is_exact for _, is_exact in found)
        likelihoods = np.array([likelihood for likelihood, _ in found])
        lengths = np.array([len(choice) for choice in question.choices])
        right.append(int(likelihoods.argmax()) == question.answer)
        right_norm.append(int((likelihoods / lengths).argmax()) == question.answer)
        on_question()
    acc, acc_norm = np.mean(right), np.mean(right_norm)
    return ChoiceFigures(
        len(questions), float(acc), _stderr(right), float(acc_norm), _stderr(right_norm), exact
    )


def _likelihoods(
    choices: Sequence[Continuation], scores: Iterator[Scored]
) -> Iterator[tuple[float, bool]]:
    for choice, scored in zip(choices, itertools.islice(scores, len(choices)), strict=True):
        yield float(scored.logprobs[-choice.count :].sum()), scored.exact


def _stderr(right: Sequence[bool]) -> float:
    """Return the standard error of a mean; 0 for a single question."""
    if len(right) < 2:
        return 0.0
    return float(np.std(right, ddof=1)) / math.sqrt(len(right))

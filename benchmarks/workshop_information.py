"""How much a label of a token, such as its language or its kind, tells of the experts it takes.

Dimension letters: T tokens, K experts of a token, Z values of what is given, X values of a label,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CODE_CHARACTERS = frozenset("#$%&*+-/<=>@[\\]^_`{|}~")
"""What code and the rules of tables are made of, and sentences are not."""
PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
KINDS = (
    "words",
    "parts of words",
    "capitals",
    "numbers",
    "punctuation",
    "code and tables",
    "spaces",
    "line ends",
    "other scripts",
)


def kind_of(text: str) -> str:
    """Return the kind of a token, one of :data:`KINDS`, by its text alone.

    A token with a letter that is not Latin, or with a part of a character, is of another script.
    White space with a line end is a line end. The other kinds are those of ``expertmesh train``,
    whose punctuation is code where all of its characters are :data:`CODE_CHARACTERS`.
    """
    from router.workshop.kinds import token_kind

    bare = text.strip()
    if not bare:
        return "line ends" if "\n" in text else "spaces"
    if any(_is_of_another_script(character) for character in bare):
        return "other scripts"
    kind = token_kind(text)
    if kind == "punctuation" and CODE_CHARACTERS.issuperset(bare):
        return "code and tables"
    return kind


def _is_of_another_script(character: str) -> bool:
    """Return whether this is a letter beyond Latin's blocks, or stands for a part of one."""
    return character == PART_OF_CHARACTER or (character.isalpha() and ord(character) >= 0x250)


def information(counts: np.ndarray) -> float:
    """Return the mutual information in nats of X and E, given Z, of counts [Z, X, E].

    It is the mean of log(p(x, e | z) / (p(x | z) p(e | z))) over what was counted.
    """
    zxe = counts.astype(np.float64)
    zx, ze = zxe.sum(2, keepdims=True), zxe.sum(1, keepdims=True)
    z = zx.sum(1, keepdims=True)
    seen = zxe > 0
    ratio = np.divide(zxe * z, zx * ze, out=np.ones_like(zxe), where=seen)
    return float((zxe * np.log(ratio)).sum() / zxe.sum())


def entropy(counts: np.ndarray) -> float:
    """Return the entropy in nats of counts [E]."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@dataclass(frozen=True, slots=True)
class Label:
    """Values [T] of a label, from 0 to below ``size``."""

    values: np.ndarray
    size: int


@dataclass(frozen=True, slots=True)
class Told:
    """The information in nats that a label has of a token's expert.

    ``by_chance`` is the mean of the same with shuffled labels and ``most_by_chance`` their largest;
    ``entropy`` is that of the experts.
    """

    found: float
    by_chance: float
    most_by_chance: float
    entropy: float

    @property
    def share(self) -> float:
        """The part of the experts' entropy that the label tells, beyond chance."""
        return (self.found - self.by_chance) / self.entropy


@dataclass(frozen=True, slots=True)
class Choices:
    """The experts [T, K] of tokens, of ``num_experts``."""

    experts: np.ndarray
    num_experts: int

    def counts(self, label: Label, given: Label) -> np.ndarray:
        """Return how often each expert was taken, [Z, X, E]; a token's K experts count alike."""
        shape = given.size, label.size, self.num_experts
        first_cells = (given.values * label.size + label.values) * self.num_experts
        cells = (first_cells[:, None] + self.experts).reshape(-1)
        return np.bincount(cells, minlength=given.size * label.size * shape[2]).reshape(shape)


Shuffle = Callable[[np.random.Generator], np.ndarray]
"""Returns a label's values [T] in another order."""


def told(
    choices: Choices, label: Label, shuffle: Shuffle, rounds: int, given: Label | None = None
) -> Told:
    """Return what a label tells of the experts where ``given`` is known already.

    ``shuffle`` is done so many ``rounds``; the same ones in every call.
    """
    given = given or Label(np.zeros_like(label.values), 1)
    counts = choices.counts(label, given)
    draws = np.random.default_rng(0)
    chance = [
        information(choices.counts(Label(shuffle(draws), label.size), given)) for _ in range(rounds)
    ]
    return Told(
        information(counts), float(np.mean(chance)), max(chance), entropy(counts.sum((0, 1)))
    )


def by_token(label: Label, within: Label | None = None) -> Shuffle:
    """Return a shuffle of the tokens' values, among the tokens of the same value of ``within``."""
    groups = np.zeros_like(label.values) if within is None else within.values
    places = np.argsort(groups, kind="stable")

    def shuffle(draws: np.random.Generator) -> np.ndarray:
        shuffled = np.empty_like(label.values)
        shuffled[places] = label.values[np.lexsort((draws.random(len(groups)), groups))]
        return shuffled

    return shuffle


def by_row(label: Label, rows: np.ndarray) -> Shuffle:
    """Return a shuffle of whole rows of text, whose tokens have one value; ``rows`` [T] are ids.

    Neighbours in a text are alike in more than the label, which a shuffle of tokens would not keep.
    """
    _, first, row_of = np.unique(rows, return_index=True, return_inverse=True)
    values = label.values[first]
    if not np.array_equal(values[row_of], label.values):
        raise ValueError("a row has tokens of several values")
    return lambda draws: draws.permutation(values)[row_of]

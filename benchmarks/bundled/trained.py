"""What the training of a bundled mixture gives, and the rows that no training sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experts.checkpoint.mixture import Mixture
from tests.local_mixture import LocalMixture
from workshop.estimators.saved.folder import files_of

HELD_OUT_EVERY = 4
Begin = Callable[[str], None]
"""Called with the name of each step of a training as it begins."""
Card = Callable[[Mixture, LocalMixture], str]
"""Makes the card of a mixture that is opened and loaded."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A mixture's content and files, and its card, whose figures are those of the loaded mixture.

    ``files`` are the bytes of each file that ``spec`` names, and of the estimator's record.
    """

    spec: Mapping[str, Any]
    files: Mapping[str, bytes]
    card: Card


def trained(estimator: Any, changes: Mapping[str, Any], card: Card) -> Trained:
    """Return a fitted estimator as a bundled mixture.

    ``changes`` replace keys of ``mixture.yaml``: the description, names of inputs and of outputs.
    """
    document, files = files_of(estimator)
    return Trained({**document, **changes}, files, card)


def is_held_out(num_rows: int) -> np.ndarray:
    """Return which of a data set's rows are held out, bool [rows]: every fourth."""
    return np.arange(num_rows) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

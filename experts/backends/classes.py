"""An expert's classes in the order of the mixture's.

Dimension letters: P rows, C classes of the mixture, N classes of the expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.errors import CheckpointError, shown


class ClassMap:
    """Places an expert's classes among the mixture's; others get 0.

    Labels are equal as in Python: 1, 1.0 and True are one label, and "1" is another.
    """

    def __init__(self, classes: Sequence[int | str]) -> None:
        """``classes`` are those of the mixture."""
        self._places = {label: place for place, label in enumerate(classes)}

    def places(self, labels: np.ndarray, where: str) -> np.ndarray:
        """Return the places [N] of an expert's classes [N].

        Raises :class:`CheckpointError` for a class that the mixture does not have.
        """
        found = []
        for label in labels.tolist():
            if label not in self._places:
                raise CheckpointError(
                    f"has the class {shown(label)}, which combine.classes does not have", where
                )
            found.append(self._places[label])
        return np.array(found, np.intp)

    def spread(self, scores: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return scores [P, N] of classes at ``places`` [N] as [P, C]; the others are 0."""
        spread = np.zeros((len(scores), len(self._places)), scores.dtype)
        spread[:, places] = scores
        return spread

    def one_hot(self, labels: np.ndarray) -> np.ndarray:
        """Return labels [P] as rows [P, C] with one 1.

        Raises ``ValueError`` for a label that the mixture does not have.
        """
        votes = np.zeros((len(labels), len(self._places)), np.float64)
        for row, label in enumerate(labels.tolist()):
            place = self._places.get(label)
            if place is None:
                raise ValueError(f"the label {shown(label)} is not one of combine.classes")
            votes[row, place] = 1.0
        return votes

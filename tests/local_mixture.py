"""A mixture in one process, to compare a cluster's predictions with: the same parts without actors.

Dimension letter: T rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from cluster.wire.arrays import DTYPES, bytes_of
from cluster.wire.tensors import from_array
from experts.backends.load import load_mixture_expert
from experts.checkpoint.mixture import Mixture
from experts.mixture.spec import default_outputs
from router.mixture.combine import combined
from router.mixture.gate import MixtureGate
from router.mixture.gather import GatherRows, answer_shape_of
from router.moe.combine import ExpertRows


class LocalMixture:
    """A mixture with all of its experts in this process. One thread uses it at a time."""

    def __init__(self, mixture: Mixture) -> None:
        """Load the gates and every expert.

        Raises :class:`CheckpointError` as :class:`router.mixture.gate.MixtureGate` and
        :func:`experts.backends.load.load_mixture_expert` do.
        """
        self.spec = mixture.spec
        self._gate = MixtureGate(mixture)
        self._experts = [
            load_mixture_expert(mixture, expert_id, torch.get_num_threads())
            for expert_id in range(len(self.spec.experts))
        ]
        self._gather = GatherRows(partial(answer_shape_of, self.spec))

    def predict(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return ``outputs`` [T, *shape] by name, by default all that the inputs allow.

        ``inputs`` are arrays [T, *shape] by name, of the inputs' datatypes. Each expert computes
        the rows that the gate gives it, in one call. Raises the errors of the gate, of an expert
        and of the combination.
        """
        names = outputs
        if names is None:
            names = [output.name for output in default_outputs(self.spec, inputs)]
        given = np.require(inputs[self.spec.rows_input.name], requirements=["C", "W"])
        rows = given.astype(DTYPES[self.spec.dtype], copy=False)
        choice = self._gate.choose(inputs)
        num_chosen = choice.ids.shape[1]
        pairs = np.flatnonzero(choice.served())
        ids = choice.ids.ravel()[pairs]
        received = []
        for expert_id in np.unique(ids).tolist():
            of_expert = pairs[ids == expert_id]
            results = self._experts[expert_id](rows[of_expert // num_chosen])
            received.append(ExpertRows(of_expert, bytes_of(results)))
        gathered, _ = self._gather.combine(received, self._gather.prepare(choice, from_array(rows)))
        return combined(
            self.spec, gathered.rows, choice.weights, choice.ids, gathered.is_present, inputs, names
        )

"""Models of an earlier deployment whose routers may still run: whether they stay, and how long.

After a redeploy with other weights, actors hold the new model's experts beside the old one's until
the old routers have ended. Where memory is short, the old experts go first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.spec import EMULATED, ActorReport, ExpertKey, ModelExperts

FREE_SHARE = 0.9
"""The share of a node's free memory that new experts may take beside the old ones."""


def experts_bytes(keys: Collection[ExpertKey], models: Mapping[str, ModelExperts]) -> int:
    """Return the bytes of experts; those of models that are not given count as nothing."""
    return sum(models[key.model].expert_bytes for key in keys if key.model in models)


def fits_beside(
    shares: Mapping[str, Sequence[ExpertKey]],
    reports: Mapping[str, ActorReport],
    models: Mapping[str, ModelExperts],
    retained: Mapping[str, ModelExperts],
    budgets_bytes: Mapping[str, int] | None,
) -> bool:
    """Return whether actors can load their shares of ``models`` beside what they retain.

    ``reports`` are of the adopted actors; other actors begin empty. With budgets, an actor's share
    and its retained experts must fit into its own. Otherwise the actors of a node must find their
    new experts' bytes in :data:`FREE_SHARE` of the memory that is free there now, and so must those
    of a card. The other actors count evenly for all nodes, since theirs are not known yet.
    """
    if budgets_bytes is not None:
        return all(
            experts_bytes(shares.get(actor_id, ()), models)
            + experts_bytes(report.experts, retained)
            <= budgets_bytes[actor_id]
            for actor_id, report in reports.items()
        )
    to_load: defaultdict[tuple[str, str], int] = defaultdict(int)
    free: dict[tuple[str, str], int] = {}
    for actor_id, report in reports.items():
        place = report.node, actor_id if report.device == EMULATED else report.device
        to_load[place] += experts_bytes({*shares.get(actor_id, ())} - {*report.experts}, models)
        free[place] = min(report.free_bytes, free.get(place, report.free_bytes))
    nodes = [place for place in to_load if place[1] == "cpu"]
    others = [experts_bytes(share, models) for a, share in shares.items() if a not in reports]
    for place in nodes:
        to_load[place] += sum(others) // len(nodes)
    return all(num_bytes <= FREE_SHARE * free[place] for place, num_bytes in to_load.items())


@dataclass(slots=True)
class Retention:
    """When retained models go: their routers have ended, or their time to drain is over."""

    begun_at_s: float
    silent_s: float
    """How long no router of a model must have been heard of before the model is unused."""
    drain_s: float
    """How long a model may stay once all experts of its successor have a copy."""
    complete_at_s: float | None = None
    _used_at_s: dict[str, float] = field(default_factory=dict)

    def over(
        self, retained: Collection[str], in_use: Collection[str], is_complete: bool, now_s: float
    ) -> dict[str, str]:
        """Return the models that go now, each with the reason.

        ``in_use`` are the models of the routers that are known now. ``is_complete`` says whether
        all experts of the deployment's own models have a copy.
        """
        if self.complete_at_s is None and is_complete:
            self.complete_at_s = now_s
        self._used_at_s |= dict.fromkeys(in_use, now_s)
        reasons: dict[str, str] = {}
        for model in retained:
            if self.complete_at_s is not None and now_s - self.complete_at_s > self.drain_s:
                reasons[model] = f"its drain time of {self.drain_s:g} s is over"
            elif now_s - self._used_at_s.get(model, self.begun_at_s) > self.silent_s:
                reasons[model] = "no router serves it any more"
        return reasons

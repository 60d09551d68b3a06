"""A configuration with other numbers of experts, by the keys that its family has for them."""

from __future__ import annotations

import copy

from experts.families.base import Config, Family

_GROUPS = ("n_group", "topk_group")


def with_counts(family: Family, config: Config, num_experts: int, top_k: int) -> Config:
    """Return a ``config.json`` with other numbers of experts of a layer and of a token.

    A single expert is a single group.
    """
    changed = copy.deepcopy(config)
    for keys, value in ((family.count_keys, num_experts), (family.top_k_keys, top_k)):
        for path in keys:
            *parents, key = path.split(".")
            part = changed
            for parent in parents:
                part = part.get(parent) or {}
            if part.get(key) is not None:
                part[key] = value
    if num_experts == 1:
        changed |= {key: 1 for key in _GROUPS if changed.get(key) is not None}
    return changed

"""EPLB's published algorithm, written from its description: what a balance is compared with.

Described at github.com/deepseek-ai/EPLB: replicate the experts with the most load a copy, pack the
copies onto devices, the heaviest first into the lightest with room; hierarchical where the groups
can be divided among nodes: groups onto nodes first, then the same within each node. It begins
anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence

Load = Sequence[float]


def packed(weights: Load, packs: int) -> list[list[int]]:
    """Divide items among packs of equally many, the heaviest first into the lightest with room."""
    size = len(weights) // packs
    result: list[list[int]] = [[] for _ in range(packs)]
    filled = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if len(result[p]) < size), key=lambda p: filled[p])
        result[pack].append(item)
        filled[pack] += weights[item]
    return result


def replicated(weights: Load, copies: int) -> list[int]:
    """Return the item of each copy: each once, the others to whom has the most load a copy."""
    counts = [1] * len(weights)
    items = list(range(len(weights)))
    while len(items) < copies:
        item = max(range(len(weights)), key=lambda i: weights[i] / counts[i])
        counts[item] += 1
        items.append(item)
    return items


def eplb(load: Load, copies: int, groups: int, nodes: int, devices: int) -> list[list[int]]:
    """Return the experts of each device, of one layer with this load by expert."""
    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    of_group = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    by_group = [sum(load[e] for e in experts) for experts in of_group]
    result: list[list[int]] = []
    for node in packed(by_group, nodes):
        experts = [e for group in node for e in of_group[group]]
        items = replicated([load[e] for e in experts], copies // nodes)
        counts = [items.count(i) for i in range(len(experts))]
        shares = [load[experts[i]] / counts[i] for i in items]
        result += [[experts[items[c]] for c in pack] for pack in packed(shares, devices // nodes)]
    return result


def device_loads(load: Load, held: Sequence[Sequence[int]]) -> list[float]:
    """Return the load of each device, where an expert's copies share its load evenly."""
    copies = [e for experts in held for e in experts]
    return [sum(load[e] / copies.count(e) for e in experts) for experts in held]

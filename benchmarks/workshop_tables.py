"""The tables of the workshop's experiments, from their result; each figure with its spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.common import Figure, show

Result = Mapping[str, Any]
WAYS = ("output", "weight", "random")
FIRST_SHARED = "token"
"""The first of the labels of the tokens that all languages have."""


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the standard deviation of a sample where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def mean_nats(nats: Mapping[str, float]) -> float:
    """Return the loss over all languages, of which each has as many tokens."""
    return statistics.fmean(nats.values())


def perplexity(nats: Mapping[str, float]) -> float:
    """Return the perplexity over all languages."""
    return math.exp(mean_nats(nats))


def seeds_of(result: Result) -> list[Mapping[str, Any]]:
    """Return the seeds' parts of the result."""
    return list(result["seeds"].values())


def models_of(result: Result) -> list[str]:
    """Return the names of the models that are trained on."""
    return list(seeds_of(result)[0]["after"])


def perplexities(result: Result, when: str, name: str) -> list[float]:
    """Return each seed's perplexity of a model ``before`` or ``after`` it is trained on."""
    return [perplexity(one[when][name]) for one in seeds_of(result)]


def behind(one: Mapping[str, Any], name: str) -> float:
    """Return by how many nats a seed's model is worse than the whole, after continued training."""
    return mean_nats(one["after"][name]) - mean_nats(one["after"]["whole"])


def counts_of(result: Result) -> list[str]:
    """Return the numbers of experts of the pruned models."""
    return list(seeds_of(result)[0]["counts"]["output"])


def pruned_nats(one: Mapping[str, Any], by: str, count: str) -> list[float]:
    """Return the losses of a seed's pruned models, several for ``random``."""
    return [mean_nats(nats) for nats in one["counts"][by][count]]


def pruned_perplexities(result: Result, by: str, count: str) -> list[float]:
    """Return the perplexities of all seeds, and of all random choices."""
    return [math.exp(n) for one in seeds_of(result) for n in pruned_nats(one, by, count)]


def gain(one: Mapping[str, Any], by: str, count: str) -> float:
    """Return by how many nats importance is better than the mean of the random choices."""
    [own] = pruned_nats(one, by, count)
    return statistics.fmean(pruned_nats(one, "random", count)) - own


def report(result: Result) -> None:
    """Print all tables."""
    for table in (_one_expert, _languages, _counts, _told, _chance, _largest):
        table(result)


def _one_expert(result: Result) -> None:
    training = seeds_of(result)[0]["training"]
    rows = [
        (
            name,
            f"{training[name]['num_parameters']:,}",
            f"{training[name]['num_active_parameters']:,}",
            *(spread(perplexities(result, when, name), 1) for when in ("before", "after")),
            spread([behind(one, name) for one in seeds_of(result)], 3),
        )
        for name in models_of(result)
    ]
    first, more = (training[name]["training_tokens"] for name in ("from scratch", "whole"))
    show(
        f"held-out perplexity, {len(seeds_of(result))} seeds; trained on {first:,} tokens, then "
        f"on {more:,} more",
        rows,
        ["model", "parameters", "active", "before", "after", "behind the whole, nats"],
    )


def _languages(result: Result) -> None:
    rows = [
        (name, *(spread(_of_language(result, name, language), 1) for language in _names(result)))
        for name in models_of(result)
    ]
    show("held-out perplexity after it, by language", rows, ["model", *_names(result)])


def _of_language(result: Result, name: str, language: str) -> list[float]:
    return [math.exp(one["after"][name][language]) for one in seeds_of(result)]


def _names(result: Result) -> list[str]:
    return list(result["text_sha256"])


def _counts(result: Result) -> None:
    rows = [
        (
            count,
            *(spread(pruned_perplexities(result, by, count), 1) for by in WAYS),
            *_gains(result, count),
        )
        for count in counts_of(result)
    ]
    whole, choices = perplexities(result, "before", "whole"), result["recipe"]["random_seeds"]
    gains = ["output's gain, nats", "better", "weight's gain, nats", "better"]
    show(
        f"pruned: held-out perplexity; whole {spread(whole, 1)}; {len(choices)} random choices a "
        "seed",
        rows,
        ["experts", "by output", "by weight", "at random", *gains],
    )


def _gains(result: Result, count: str) -> Iterable[str]:
    """Yield each importance's gain on chance, and in how many seeds it has one."""
    for by in ("output", "weight"):
        gains = [gain(one, by, count) for one in seeds_of(result)]
        yield spread(gains, 3)
        yield f"{sum(each > 0 for each in gains)} of {len(gains)}"


def layers_of(result: Result) -> list[list[Mapping[str, Any]]]:
    """Return what is known of the experts: of each layer, a list of the seeds."""
    of_seeds = [one["experts"]["layers"] for one in seeds_of(result)]
    return [list(layers) for layers in zip(*of_seeds, strict=True)]


def _told(result: Result) -> None:
    labels = list(layers_of(result)[0][0]["told"])
    rows = [
        (
            str(layers[0]["layer"]),
            *(
                spread([100 * layer["told"][label]["share"] for layer in layers], 1)
                for label in labels
            ),
        )
        for layers in layers_of(result)
    ]
    shared = [one["experts"]["shared"] for one in seeds_of(result)]
    show(
        "% of the experts' entropy that a label tells beyond chance; from "
        f"{FIRST_SHARED} on: of the {len(shared[0]['tokens'])} tokens of all languages, "
        f"{100 * shared[0]['share']:.0f} % of the text",
        rows,
        ["layer", *labels],
    )


def _chance(result: Result) -> None:
    rows = []
    for label in layers_of(result)[0][0]["told"]:
        told = [layer["told"][label] for layers in layers_of(result) for layer in layers]
        beyond = sum(one["found"] > one["most_by_chance"] for one in told)
        found, mean, most = (
            [100 * one[part] / one["entropy"] for one in told]
            for part in ("found", "by_chance", "most_by_chance")
        )
        rows.append(
            (
                label,
                f"{min(found):.2f} to {max(found):.2f}",
                f"{statistics.fmean(mean):.2f}",
                f"{max(most):.2f}",
                f"{beyond} of {len(told)}",
            )
        )
    columns = ["label", "found", "shuffled, mean", "shuffled, largest", "beyond its own shuffles"]
    show("% of the experts' entropy, uncorrected, over layers and seeds", rows, columns)


def _largest(result: Result) -> None:
    """Print the largest shares; experts are those of a layer and a seed, so only shares compare."""
    rows = []
    for part in ("kinds", "languages"):
        for name in layers_of(result)[0][0][part]:
            of_layers = [
                spread([100 * max(layer[part][name]) for layer in layers if name in layer[part]], 0)
                for layers in layers_of(result)
            ]
            rows.append((name, *of_layers))
    recipe = result["recipe"]["model"]
    even = 100 / recipe["num_local_experts"]
    most = 100 / recipe["num_experts_per_tok"]
    show(
        f"an expert's largest share, %; even {even:.1f}, at most {most:.0f}",
        rows,
        ["of", *(f"layer {layers[0]['layer']}" for layers in layers_of(result))],
    )


def figures_of(result: Result) -> dict[str, Figure]:
    """Return the figures that a later run is compared with; those of experts are context."""
    figures = {}
    for name in models_of(result):
        for when in ("before", "after"):
            nats = [mean_nats(one[when][name]) for one in seeds_of(result)]
            figures[f"{name}, {when}, nats"] = Figure(statistics.fmean(nats), "lower")
    for count in counts_of(result):
        for by in ("output", "weight"):
            gains = [gain(one, by, count) for one in seeds_of(result)]
            name = f"{by}'s gain, {count} experts, nats"
            figures[name] = Figure(statistics.fmean(gains), "context")
    for layers in layers_of(result):
        for label in layers[0]["told"]:
            shares = [layer["told"][label]["share"] for layer in layers]
            name = f"layer {layers[0]['layer']}, {label}, share"
            figures[name] = Figure(statistics.fmean(shares), "context")
    return figures
